//! What an input may cost, whatever is in it.

use std::cell::{Cell, RefCell};
use std::io::{self, Read};
use std::rc::Rc;

/// Bounds of a diagnosis.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most files read of all folders and archives together.
    pub files_max: usize,
    /// Deepest folder below one that was named.
    pub depth_max: usize,
    /// Most bytes that come out of compressed files and archives, all inputs together.
    pub expanded_bytes_max: u64,
    /// Largest ratio of what comes out of a compressed file to what went in, looked at once
    /// [`Limits::ratio_from_bytes`] have come out. Deflate ends at 1,032.
    pub ratio_max: u64,
    /// See [`Limits::ratio_max`].
    pub ratio_from_bytes: u64,
    /// Most bytes of an archive that has to be put into a temporary file because it cannot be read in any order where it
    /// is: compressed, inside another one, or on standard input.
    pub spool_bytes_max: u64,
    /// Most bytes an archive's table of contents may have.
    pub index_bytes_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            files_max: 10_000,
            depth_max: 16,
            expanded_bytes_max: 16 << 30,
            ratio_max: 1_100,
            ratio_from_bytes: 256 << 20,
            spool_bytes_max: 4 << 30,
            index_bytes_max: 32 << 20,
        }
    }
}

/// Counts bytes and ends a stream instead of failing: a log that breaks off has been a log until then.
///
/// The reason why it ended early is kept for the notes.
pub(super) struct Tap<R> {
    inner: R,
    count: Rc<Cell<u64>>,
    fault: Rc<RefCell<Option<String>>>,
    bound: Option<Bound>,
}

/// When a compressed stream is ended.
pub(super) struct Bound {
    /// Bytes that went into the decoder.
    pub(super) compressed: Rc<Cell<u64>>,
    /// Bytes that may still come out, all inputs together.
    pub(super) budget: Rc<Cell<u64>>,
    pub(super) limits: Limits,
}

impl Bound {
    /// Why `fresh` more bytes are too many.
    fn excess(&self, so_far: u64, fresh: u64) -> Option<String> {
        let left = self.budget.get();
        self.budget.set(left.saturating_sub(fresh));
        if fresh > left {
            return Some(format!(
                "more than {} come out of compressed files; the rest was not read",
                mib(self.limits.expanded_bytes_max)
            ));
        }
        let out = so_far + fresh;
        let over = out > self.limits.ratio_from_bytes && out / self.compressed.get().max(1) > self.limits.ratio_max;
        over.then(|| {
            format!(
                "{} come out of {} KiB: this looks like a decompression bomb; the rest was not read",
                mib(out),
                self.compressed.get().div_ceil(1024)
            )
        })
    }
}

pub(super) fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

impl<R: Read> Tap<R> {
    /// Counts and ends early, without a bound.
    pub(super) fn new(inner: R) -> Self {
        Self { inner, count: Rc::default(), fault: Rc::default(), bound: None }
    }

    /// The same with a bound.
    pub(super) fn bounded(inner: R, bound: Bound) -> Self {
        Self { inner, count: Rc::default(), fault: Rc::default(), bound: Some(bound) }
    }

    /// Bytes that went through, readable while the stream is in use.
    pub(super) fn count(&self) -> Rc<Cell<u64>> {
        Rc::clone(&self.count)
    }

    /// Why the stream ended early, once it has.
    pub(super) fn fault(&self) -> Rc<RefCell<Option<String>>> {
        Rc::clone(&self.fault)
    }
}

impl<R: Read> Read for Tap<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.fault.borrow().is_some() {
            return Ok(0);
        }
        let count = match self.inner.read(buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Err(error),
            Err(error) => {
                self.fault.replace(Some(format!("ends early: {error}")));
                return Ok(0);
            }
        };
        let fresh = count as u64;
        if let Some(excess) = self.bound.as_ref().and_then(|bound| bound.excess(self.count.get(), fresh)) {
            self.fault.replace(Some(excess));
            return Ok(0);
        }
        self.count.set(self.count.get() + fresh);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::new(io::ErrorKind::UnexpectedEof, "cut"))
        }
    }

    #[test]
    fn a_stream_that_breaks_ends_and_says_why() {
        let mut tap = Tap::new(b"abc".chain(Broken));
        let mut out = String::new();
        tap.read_to_string(&mut out).unwrap();
        assert_eq!((out.as_str(), tap.count().get()), ("abc", 3));
        assert_eq!(tap.fault().borrow().as_deref(), Some("ends early: cut"));
    }

    #[test]
    fn a_stream_ends_at_its_ratio_and_at_the_common_budget() {
        let limits = Limits { ratio_max: 10, ratio_from_bytes: 1000, expanded_bytes_max: 1 << 20, ..Limits::default() };
        let run = |compressed: u64, budget: u64| {
            let bound =
                Bound { compressed: Rc::new(Cell::new(compressed)), budget: Rc::new(Cell::new(budget)), limits };
            let mut tap = Tap::bounded(io::repeat(b'x').take(100_000), bound);
            let read = io::copy(&mut tap, &mut io::sink()).unwrap();
            let fault = tap.fault().borrow().clone();
            (read, fault.unwrap_or_default())
        };
        assert_eq!(run(50_000, 1 << 20), (100_000, String::new()));
        let (read, fault) = run(200, 1 << 20);
        assert!(read < 20_000 && fault.contains("bomb"), "{read} {fault}");
        let (read, fault) = run(50_000, 30_000);
        assert!(read <= 30_000 && fault.contains("more than 1 MiB"), "{read} {fault}");
    }
}
