//! What can be wrong with a catalogue.

/// A catalogue that cannot be used. The text reads after "failed to load the catalogue: ".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CatalogueError {
    /// Two modes share an id.
    #[error("mode {id} is defined twice")]
    DuplicateMode {
        /// The id both carry.
        id: String,
    },
    /// Two signs share a name; names are global so that rules of other modes can refer to them.
    #[error("sign {sign:?} is defined by {first} and by {second}")]
    DuplicateSign {
        /// The name both carry.
        sign: String,
        /// Mode that defined it first.
        first: String,
        /// Mode that defined it again.
        second: String,
    },
    /// A pattern that is not a regular expression.
    #[error("sign {sign:?} of {mode}: {what} is not a regular expression: {source}")]
    Pattern {
        /// Mode the sign belongs to.
        mode: String,
        /// The sign.
        sign: String,
        /// Which field: `pattern` or `unless`.
        what: &'static str,
        /// What the regex parser says.
        source: Box<regex::Error>,
    },
    /// A sign without anchors would have to be searched in every line.
    #[error("sign {sign:?} of {mode}: {why}")]
    Sign {
        /// Mode the sign belongs to.
        mode: String,
        /// The sign.
        sign: String,
        /// What is wrong with it.
        why: String,
    },
    /// A rule that refers to something unknown or can never hold.
    #[error("rule {rule:?} of {mode}: {why}")]
    Rule {
        /// Mode the rule belongs to.
        mode: String,
        /// The rule.
        rule: String,
        /// What is wrong with it.
        why: String,
    },
    /// A mode that refers to a mode nobody defines.
    #[error("mode {mode}: {field} names {target}, which no file defines")]
    UnknownMode {
        /// The referring mode.
        mode: String,
        /// `explains` or `contributing`.
        field: &'static str,
        /// The id that is missing.
        target: String,
    },
    /// All patterns together do not compile (too large).
    #[error("the signs do not compile together: {source}")]
    Set {
        /// What the regex compiler says.
        source: Box<regex::Error>,
    },
    /// Too many signs or nodes for the fixed-size tables of the classifier.
    #[error("{count} signs are more than the {limit} a catalogue may hold")]
    TooMany {
        /// Signs found.
        count: usize,
        /// Signs allowed.
        limit: usize,
    },
}
