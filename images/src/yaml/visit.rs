//! The two untyped walks over a document: one refuses what no type would notice, one finds a node's position.
//!
//! Neither knows the YAML package: both are plain serde visitors.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use super::{MAX_DEPTH, MAX_NODES, PLAIN_KEY, Segment};

#[derive(Default)]
pub(super) struct WalkState {
    pub(super) path: Vec<Segment>,
    depth: usize,
    nodes: usize,
    /// Message and expectation of the first problem; its position travels with the parser's error.
    pub(super) problem: Option<(String, Option<String>)>,
}

/// Visits every node once, types unknown.
#[derive(Clone, Copy)]
pub(super) struct Walker<'s> {
    pub(super) state: &'s RefCell<WalkState>,
}

impl Walker<'_> {
    fn refuse<E: de::Error>(self, message: String, expected: Option<String>) -> E {
        let error = E::custom(&message);
        self.state.borrow_mut().problem = Some((message, expected));
        error
    }

    fn count<E: de::Error>(self) -> Result<(), E> {
        let mut state = self.state.borrow_mut();
        state.nodes += 1;
        if state.nodes > MAX_NODES {
            drop(state);
            let message = "the document expands to too many values".to_owned();
            return Err(self.refuse(message, Some(format!("at most {MAX_NODES}, aliases expanded"))));
        }
        Ok(())
    }

    fn enter<E: de::Error>(self) -> Result<(), E> {
        let mut state = self.state.borrow_mut();
        state.depth += 1;
        if state.depth > MAX_DEPTH {
            drop(state);
            return Err(self.refuse("nested too deeply".to_owned(), Some(format!("at most {MAX_DEPTH} levels"))));
        }
        Ok(())
    }

    fn leave(self) {
        self.state.borrow_mut().depth -= 1;
    }
}

impl<'de> DeserializeSeed<'de> for Walker<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

macro_rules! scalars {
    ($($method:ident: $kind:ty),*) => {
        $(fn $method<E: de::Error>(self, _: $kind) -> Result<(), E> { self.count() })*
    };
}

impl<'de> Visitor<'de> for Walker<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any YAML value")
    }

    scalars!(visit_bool: bool, visit_i64: i64, visit_u64: u64, visit_i128: i128, visit_u128: u128, visit_f64: f64, visit_str: &str);

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        self.count()
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        self.count()?;
        self.enter()?;
        let mut index = 0;
        loop {
            self.state.borrow_mut().path.push(Segment::Index(index));
            if list.next_element_seed(self)?.is_none() {
                break;
            }
            self.state.borrow_mut().path.pop();
            index += 1;
        }
        self.state.borrow_mut().path.pop();
        self.leave();
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        self.count()?;
        self.enter()?;
        let mut seen = BTreeSet::new();
        while let Some(key) = map.next_key_seed(UniqueKey { walker: self, seen: &seen })? {
            self.state.borrow_mut().path.push(Segment::Key(key.clone()));
            seen.insert(key);
            map.next_value_seed(self)?;
            self.state.borrow_mut().path.pop();
        }
        self.leave();
        Ok(())
    }

    fn visit_enum<A: de::EnumAccess<'de>>(self, _: A) -> Result<(), A::Error> {
        Err(self.refuse("YAML tags (`!name`) are not used here".to_owned(), Some("a plain value".to_owned())))
    }
}

/// A mapping's key: a scalar not seen before in this mapping.
struct UniqueKey<'s> {
    walker: Walker<'s>,
    seen: &'s BTreeSet<String>,
}

impl<'de> DeserializeSeed<'de> for UniqueKey<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        // As text, whatever it looks like: `1` and `"1"` would collide in a map of strings.
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for UniqueKey<'_> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PLAIN_KEY)
    }

    fn visit_str<E: de::Error>(self, key: &str) -> Result<String, E> {
        self.walker.count()?;
        if self.seen.contains(key) {
            return Err(self.walker.refuse(format!("duplicate key `{key}`"), Some("each key once".to_owned())));
        }
        Ok(key.to_owned())
    }
}

/// Walks to one node and fails there, on purpose: the parser puts the node's position into the error.
pub(super) struct Seeker<'p> {
    pub(super) path: &'p [Segment],
    pub(super) found: &'p RefCell<bool>,
}

impl<'de> DeserializeSeed<'de> for Seeker<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

macro_rules! sought {
    ($($method:ident: $kind:ty),*) => {
        $(fn $method<E: de::Error>(self, _: $kind) -> Result<(), E> { self.arrive() })*
    };
}

impl Seeker<'_> {
    fn arrive<E: de::Error>(&self) -> Result<(), E> {
        *self.found.borrow_mut() = self.path.is_empty();
        Err(E::custom("sought"))
    }
}

impl<'de> Visitor<'de> for Seeker<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the value sought")
    }

    sought!(visit_bool: bool, visit_i64: i64, visit_u64: u64, visit_i128: i128, visit_u128: u128, visit_f64: f64, visit_str: &str);

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        self.arrive()
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let Some((Segment::Index(wanted), rest)) = self.path.split_first() else {
            return self.arrive();
        };
        for _ in 0..*wanted {
            if list.next_element::<de::IgnoredAny>()?.is_none() {
                return Err(de::Error::custom("not there"));
            }
        }
        let seeker = Seeker { path: rest, found: self.found };
        list.next_element_seed(seeker)?.ok_or_else(|| de::Error::custom("not there"))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Some((Segment::Key(wanted), rest)) = self.path.split_first() else {
            return self.arrive();
        };
        while let Some(key) = map.next_key::<String>()? {
            if key == *wanted {
                return map.next_value_seed(Seeker { path: rest, found: self.found });
            }
            map.next_value::<de::IgnoredAny>()?;
        }
        Err(de::Error::custom("not there"))
    }
}
