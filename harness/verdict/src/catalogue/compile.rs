//! From the catalogue's data to what the classifier runs on.

use std::collections::HashMap;

use regex::bytes::{Regex, RegexBuilder, RegexSet};

use super::{ANCHOR_BYTES_MIN, EndsWait, Kind, Mode, REGEX_SIZE_MAX, Rule, SIGNS_MAX, Sign, When};
use crate::error::CatalogueError;

/// A compiled sign.
#[derive(Debug)]
pub(crate) struct CompiledSign {
    pub(crate) sign: Sign,
    pub(crate) mode: usize,
    pub(crate) unless: Option<Regex>,
    pub(crate) pattern: Regex,
    pub(crate) recovered_by: Vec<usize>,
}

/// A compiled rule; signs by index.
#[derive(Debug)]
pub(crate) struct CompiledRule {
    pub(crate) mode: usize,
    pub(crate) rule: Rule,
    pub(crate) all: Vec<Vec<usize>>,
    pub(crate) none: Vec<(usize, When, Option<u64>)>,
    pub(crate) outnumbered_by: Vec<usize>,
    pub(crate) voided_by: Vec<usize>,
    /// `unless_recovered_by` and `recovered_by` together.
    pub(crate) recovered_by: Vec<usize>,
}

/// Everything compiled.
#[derive(Debug)]
pub(crate) struct Compiled {
    pub(crate) modes: Vec<Mode>,
    pub(crate) signs: Vec<CompiledSign>,
    pub(crate) rules: Vec<CompiledRule>,
    /// For each sign the rules that name it in a group.
    pub(crate) rules_of_sign: Vec<Vec<usize>>,
    /// Finds lines that may hold a sign.
    pub(crate) prefilter: Regex,
    /// Finds the signs of such a line.
    pub(crate) set: RegexSet,
}

fn build(pattern: &str, mode: &str, sign: &str, what: &'static str) -> Result<Regex, CatalogueError> {
    RegexBuilder::new(pattern).unicode(false).size_limit(REGEX_SIZE_MAX).build().map_err(|source| {
        CatalogueError::Pattern { mode: mode.to_owned(), sign: sign.to_owned(), what, source: Box::new(source) }
    })
}

pub(super) fn compile_signs(modes: &[Mode]) -> Result<(Vec<CompiledSign>, HashMap<&str, usize>), CatalogueError> {
    let mut signs: Vec<CompiledSign> = Vec::new();
    let mut index: HashMap<&str, usize> = HashMap::new();
    for (m, mode) in modes.iter().enumerate() {
        for sign in &mode.signs {
            if let Some(&first) = index.get(sign.name.as_str()) {
                return Err(CatalogueError::DuplicateSign {
                    sign: sign.name.clone(),
                    first: modes[signs[first].mode].id.clone(),
                    second: mode.id.clone(),
                });
            }
            let bad = |why: String| CatalogueError::Sign { mode: mode.id.clone(), sign: sign.name.clone(), why };
            if sign.anchors.is_empty() {
                return Err(bad("it has no anchors; every line would have to be searched for it".to_owned()));
            }
            for anchor in &sign.anchors {
                if anchor.len() < ANCHOR_BYTES_MIN {
                    return Err(bad(format!("anchor {anchor:?} is shorter than {ANCHOR_BYTES_MIN} bytes")));
                }
                if anchor.bytes().any(|b| !(b' '..=b'~').contains(&b) || b"\"\\<>&".contains(&b)) {
                    return Err(bad(format!("anchor {anchor:?} has a character that JSON wrapping may change")));
                }
            }
            let pattern = build(&sign.pattern, &mode.id, &sign.name, "pattern")?;
            if pattern.is_match(b"") {
                return Err(bad("its pattern matches every line".to_owned()));
            }
            let unless = sign.unless.as_deref().map(|u| build(u, &mode.id, &sign.name, "unless")).transpose()?;
            index.insert(&sign.name, signs.len());
            signs.push(CompiledSign { sign: sign.clone(), mode: m, unless, pattern, recovered_by: Vec::new() });
        }
    }
    for compiled in &mut signs {
        for name in &compiled.sign.recovered_by {
            let found = index.get(name.as_str()).copied().ok_or_else(|| CatalogueError::Sign {
                mode: modes[compiled.mode].id.clone(),
                sign: compiled.sign.name.clone(),
                why: format!("no sign is called {name:?}"),
            })?;
            compiled.recovered_by.push(found);
        }
    }
    if signs.len() > SIGNS_MAX {
        return Err(CatalogueError::TooMany { count: signs.len(), limit: SIGNS_MAX });
    }
    Ok((signs, index))
}

pub(super) fn compile_rules(modes: &[Mode], signs: &HashMap<&str, usize>) -> Result<Vec<CompiledRule>, CatalogueError> {
    let mut rules = Vec::new();
    for (m, mode) in modes.iter().enumerate() {
        for rule in &mode.rules {
            let bad = |why: String| CatalogueError::Rule { mode: mode.id.clone(), rule: rule.name.clone(), why };
            let find = |name: &String| {
                signs.get(name.as_str()).copied().ok_or_else(|| bad(format!("no sign is called {name:?}")))
            };
            if mode.kind == Kind::Shared {
                return Err(bad("a mode of shared signs has no verdict, so it can have no rules".to_owned()));
            }
            if rule.all.is_empty() || rule.all.iter().any(Vec::is_empty) {
                return Err(bad("a group of signs is empty".to_owned()));
            }
            if rule.ends_wait == EndsWait::AfterAllowance && rule.allowance_s.is_none() {
                return Err(bad("ends_wait: after-allowance needs allowance_s".to_owned()));
            }
            let all = rule.all.iter().map(|g| g.iter().map(find).collect()).collect::<Result<Vec<Vec<usize>>, _>>()?;
            let none =
                rule.none.iter().map(|e| Ok((find(&e.sign)?, e.when, e.within_s))).collect::<Result<Vec<_>, _>>()?;
            let outnumbered_by = rule.outnumbered_by.iter().map(find).collect::<Result<Vec<_>, _>>()?;
            let voided_by = rule.unless_recovered_by.iter().map(find).collect::<Result<Vec<_>, _>>()?;
            let mut recovered_by = rule.recovered_by.iter().map(find).collect::<Result<Vec<_>, _>>()?;
            recovered_by.extend(&voided_by);
            rules.push(CompiledRule {
                mode: m,
                rule: rule.clone(),
                all,
                none,
                outnumbered_by,
                voided_by,
                recovered_by,
            });
        }
    }
    Ok(rules)
}

/// One alternation of plain literals, which the regex engine turns into a multi-substring searcher.
pub(super) fn prefilter(signs: &[CompiledSign]) -> Result<Regex, CatalogueError> {
    let mut anchors: Vec<&str> = signs.iter().flat_map(|s| s.sign.anchors.iter().map(String::as_str)).collect();
    anchors.extend(crate::diagnose::EXTRA_ANCHORS);
    anchors.sort_unstable();
    anchors.dedup();
    // A literal that contains another one is found through the shorter one.
    let all = anchors.clone();
    anchors.retain(|a| !all.iter().any(|b| b.len() < a.len() && a.contains(b)));
    let pattern = anchors.iter().map(|a| regex::escape(a)).collect::<Vec<_>>().join("|");
    RegexBuilder::new(&pattern)
        .unicode(false)
        .size_limit(REGEX_SIZE_MAX)
        .build()
        .map_err(|source| CatalogueError::Set { source: Box::new(source) })
}
