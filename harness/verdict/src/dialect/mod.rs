//! The dialects: how programs print, and what wraps their lines on the way into a file.
//!
//! Wrappers come off one after the other, outermost first ([`wrapper`], [`json`], [`ansi`]); what is left is a program's
//! own line, whose kind and level [`program`] tells. Nothing here fails: a line that fits no dialect is its own message.

pub mod ansi;
pub mod json;
pub mod program;
pub mod time;
pub mod trace;
pub mod wrapper;
