//! Trying again: policies, and one function that follows them.
//!
//! What is worth another attempt is the caller's knowledge and is asked for by a classifier; nothing is retried because
//! it failed.

use std::future::Future;
use std::time::Duration;

use backoff::backoff::{Backoff, Constant};
use backoff::{ExponentialBackoff, ExponentialBackoffBuilder};

/// When to try again, and when to stop.
#[derive(Debug, Clone, PartialEq)]
pub enum Policy {
    /// The same pause between attempts.
    Constant {
        /// The pause.
        interval: Duration,
        /// Attempts in all, the first among them; at least one is made.
        max_attempts: u32,
    },
    /// Pauses that double, each varied at random by up to a half so that several callers do not march in step.
    Exponential {
        /// The first pause.
        initial: Duration,
        /// The longest pause.
        max_interval: Duration,
        /// Time from the first attempt's start after which no other attempt begins.
        max_elapsed: Duration,
        /// Attempts in all, the first among them; at least one is made.
        max_attempts: u32,
    },
}

/// Whether an error may pass by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Another attempt may succeed.
    Transient,
    /// Another attempt would end the same way.
    Permanent,
}

/// A success and what it took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retried<T> {
    /// The result.
    pub value: T,
    /// Attempts made, the successful one among them.
    pub attempts: u32,
}

/// Why no further attempt was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GaveUp {
    /// The last error is permanent.
    Permanent,
    /// The policy allows no more attempts.
    Attempts,
    /// The policy's time is over.
    Elapsed,
}

/// The last error and what came before it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{error} ({attempts} {}{})",
    if *.attempts == 1 { "attempt" } else { "attempts" },
    if *.gave_up == GaveUp::Elapsed { ", out of time" } else { "" }
)]
pub struct RetryError<E: std::fmt::Display> {
    /// The last attempt's error.
    pub error: E,
    /// Attempts made.
    pub attempts: u32,
    /// Why it was the last.
    pub gave_up: GaveUp,
}

enum Pauses {
    Constant(Constant),
    Exponential(Box<ExponentialBackoff>),
}

impl Policy {
    fn max_attempts(&self) -> u32 {
        match self {
            Self::Constant { max_attempts, .. } | Self::Exponential { max_attempts, .. } => *max_attempts,
        }
    }

    fn pauses(&self) -> Pauses {
        match self {
            Self::Constant { interval, .. } => Pauses::Constant(Constant::new(*interval)),
            Self::Exponential { initial, max_interval, max_elapsed, .. } => Pauses::Exponential(Box::new(
                ExponentialBackoffBuilder::new()
                    .with_initial_interval(*initial)
                    .with_multiplier(2.0)
                    .with_randomization_factor(0.5)
                    .with_max_interval(*max_interval)
                    .with_max_elapsed_time(Some(*max_elapsed))
                    .build(),
            )),
        }
    }
}

impl Pauses {
    fn next(&mut self) -> Option<Duration> {
        match self {
            Self::Constant(policy) => policy.next_backoff(),
            Self::Exponential(policy) => policy.next_backoff(),
        }
    }
}

/// Runs `operation` until it succeeds, its error is permanent or the policy is exhausted.
///
/// `operation` gets the attempt's number, from 1. `on_retry` is told of every failed attempt that is followed by another:
/// its number, its error and the pause. Dropping the future stops it at once.
///
/// # Errors
/// The last attempt's error, with the number of attempts and why it was the last.
pub async fn retry<T, E, F, Fut>(
    policy: &Policy,
    classify: impl Fn(&E) -> Class,
    mut on_retry: impl FnMut(u32, &E, Duration),
    mut operation: F,
) -> Result<Retried<T>, RetryError<E>>
where
    E: std::fmt::Display,
    F: FnMut(u32) -> Fut,
    Fut: Future<Output = Result<T, E>>,
{
    let mut pauses = policy.pauses();
    let mut attempts = 0;
    loop {
        attempts += 1;
        let error = match operation(attempts).await {
            Ok(value) => return Ok(Retried { value, attempts }),
            Err(error) => error,
        };
        if classify(&error) == Class::Permanent {
            return Err(RetryError { error, attempts, gave_up: GaveUp::Permanent });
        }
        if attempts >= policy.max_attempts() {
            return Err(RetryError { error, attempts, gave_up: GaveUp::Attempts });
        }
        let Some(pause) = pauses.next() else {
            return Err(RetryError { error, attempts, gave_up: GaveUp::Elapsed });
        };
        on_retry(attempts, &error, pause);
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn constant(max_attempts: u32) -> Policy {
        Policy::Constant { interval: Duration::from_millis(1), max_attempts }
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap()
    }

    #[test]
    fn a_transient_error_is_tried_again_and_reported() {
        let mut told = Vec::new();
        let result = runtime().block_on(retry(
            &constant(3),
            |_: &String| Class::Transient,
            |attempt, error, pause| told.push((attempt, error.clone(), pause)),
            |attempt| async move { if attempt < 3 { Err(format!("no {attempt}")) } else { Ok(attempt) } },
        ));
        assert_eq!(result.unwrap(), Retried { value: 3, attempts: 3 });
        let pause = Duration::from_millis(1);
        assert_eq!(told, [(1, "no 1".to_owned(), pause), (2, "no 2".to_owned(), pause)]);
    }

    #[test]
    fn attempts_are_bounded() {
        let error = runtime()
            .block_on(retry(&constant(2), |_| Class::Transient, |_, _, _| {}, |n| async move { Err::<(), _>(n) }))
            .unwrap_err();
        assert_eq!((error.error, error.attempts, error.gave_up), (2, 2, GaveUp::Attempts));
        assert_eq!(error.to_string(), "2 (2 attempts)");
    }

    #[test]
    fn a_permanent_error_ends_it() {
        let error = runtime()
            .block_on(retry(&constant(9), |_| Class::Permanent, |_, _, _| {}, |n| async move { Err::<(), _>(n) }))
            .unwrap_err();
        assert_eq!((error.attempts, error.gave_up), (1, GaveUp::Permanent));
    }

    #[test]
    fn exponential_pauses_grow_up_to_their_bound_and_end_with_the_time() {
        let policy = Policy::Exponential {
            initial: Duration::from_millis(4),
            max_interval: Duration::from_millis(8),
            max_elapsed: Duration::from_millis(60),
            max_attempts: 1_000,
        };
        let mut pauses = Vec::new();
        let error = runtime()
            .block_on(retry(
                &policy,
                |_| Class::Transient,
                |_, _, pause| pauses.push(pause),
                |n| async move { Err::<(), _>(n) },
            ))
            .unwrap_err();
        assert_eq!(error.gave_up, GaveUp::Elapsed);
        assert!(pauses[0] >= Duration::from_millis(2) && pauses[0] <= Duration::from_millis(6), "{pauses:?}");
        assert!(pauses.iter().all(|pause| *pause <= Duration::from_millis(12)), "{pauses:?}");
    }
}
