//! A client of QEMU's machine protocol (QMP) over a unix socket.
//!
//! The protocol, one JSON object a line (QEMU, `docs/interop/qmp-spec`): a greeting `{"QMP": …}`; `qmp_capabilities` ends the negotiation; commands
//! `{"execute": …, "arguments": …, "id": …}` are answered by `{"return": …, "id": …}` or `{"error": {"class", "desc"}, "id": …}`; events `{"event": …, "data": …, "timestamp": …}` come
//! in between, at any time. Unknown events and fields are kept, for whoever knows them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use serde_json::{Value, json};
use thiserror::Error;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use crate::unix::connect_when_there;

/// The longest line that is read; QEMU's longest answers (`query-qmp-schema`) are some 200 KiB.
pub const LINE_MAX_BYTES: usize = 4 * 1024 * 1024;

/// How many lines that are no QMP are put up with before the connection counts as broken.
pub const GARBAGE_LINES_MAX: u32 = 64;

/// How many events a receiver may lag behind before it loses the oldest.
const EVENT_QUEUE: usize = 1024;

/// How many commands may wait to be written.
const COMMAND_QUEUE: usize = 32;

/// What can go wrong on QMP.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum QmpError {
    /// Nobody took the connection in time.
    #[error("could not connect to QMP socket {path}: {what}")]
    Connect {
        /// The socket.
        path: Utf8PathBuf,
        /// The last attempt's error.
        what: String,
    },
    /// No answer in time (`greeting` where it was the greeting that did not come).
    #[error("QMP {command} unanswered after {timeout_ms} ms")]
    Timeout {
        /// The command.
        command: String,
        /// How long it was waited for.
        timeout_ms: u64,
    },
    /// QEMU answered with an error.
    #[error("QMP {command} refused: {class}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class.
        class: String,
        /// QEMU's text.
        description: String,
    },
    /// The connection is gone.
    #[error("QMP connection closed: {what}")]
    Closed {
        /// Why.
        what: String,
    },
    /// The other side does not speak QMP.
    #[error("not QMP: {what}")]
    Protocol {
        /// What came.
        what: String,
    },
}

/// An event as QEMU sent it.
#[derive(Debug, Clone, PartialEq)]
pub struct QmpEvent {
    /// Its name, such as `SHUTDOWN`.
    pub name: String,
    /// Its data; null where it has none.
    pub data: Value,
    /// Microseconds since the epoch by the host's clock, as QEMU read it.
    pub timestamp_us: Option<u64>,
    /// The whole message, unknown fields included.
    pub raw: Value,
}

/// A connection. Clones share it; it ends with the last of them.
#[derive(Debug, Clone)]
pub struct Qmp {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    lines: mpsc::Sender<String>,
    first_events: Mutex<Option<broadcast::Receiver<QmpEvent>>>,
    greeting: Value,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Inner {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    events: broadcast::Sender<QmpEvent>,
    closed: watch::Sender<Option<QmpError>>,
}

type Answer = Result<Value, (String, String)>;

#[derive(Debug, Default)]
struct State {
    next_id: u64,
    pending: HashMap<u64, oneshot::Sender<Answer>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, why: QmpError) {
        self.closed.send_if_modified(|closed| {
            let first = closed.is_none();
            if first {
                *closed = Some(why);
            }
            first
        });
        // Their receivers see the drop and look up the reason.
        self.state().pending.clear();
    }

    fn why_closed(&self) -> QmpError {
        self.closed.borrow().clone().unwrap_or_else(|| QmpError::Closed { what: "by this side".to_owned() })
    }
}

impl Qmp {
    /// Connects, waiting for the socket to be there, and negotiates; all within `timeout`.
    ///
    /// # Errors
    /// [`QmpError::Connect`], [`QmpError::Timeout`], [`QmpError::Closed`] or [`QmpError::Protocol`].
    pub async fn connect(path: &Utf8Path, timeout: Duration) -> Result<Self, QmpError> {
        let deadline = Instant::now() + timeout;
        let stream = connect_when_there(path, deadline)
            .await
            .map_err(|error| QmpError::Connect { path: path.to_owned(), what: error.to_string() })?;
        let (read, write) = stream.into_split();
        let mut reader = Lines { from: BufReader::new(read), garbage: 0 };
        let greeting = timeout_at(deadline, reader.next_matching(|message| message.get("QMP").is_some()))
            .await
            .map_err(|_| QmpError::Timeout { command: "greeting".to_owned(), timeout_ms: millis(timeout) })??;
        let (events, first_events) = broadcast::channel(EVENT_QUEUE);
        let shared = Arc::new(Shared { state: Mutex::default(), events, closed: watch::Sender::new(None) });
        let (lines, to_write) = mpsc::channel(COMMAND_QUEUE);
        let tasks =
            [tokio::spawn(read_all(reader, shared.clone())), tokio::spawn(write_all(write, to_write, shared.clone()))];
        let inner = Inner { shared, lines, first_events: Mutex::new(Some(first_events)), greeting, tasks };
        let qmp = Self { inner: Arc::new(inner) };
        qmp.execute("qmp_capabilities", Value::Null, deadline.saturating_duration_since(Instant::now())).await?;
        Ok(qmp)
    }

    /// The greeting, with QEMU's version in it.
    #[must_use]
    pub fn greeting(&self) -> &Value {
        &self.inner.greeting
    }

    /// Runs a command; `arguments` is an object, or null for none. An answer that comes after the time-out is dropped.
    ///
    /// # Errors
    /// [`QmpError::Timeout`], [`QmpError::Refused`], or what closed the connection.
    pub async fn execute(&self, command: &str, arguments: Value, timeout: Duration) -> Result<Value, QmpError> {
        let shared = &self.inner.shared;
        let (answer, answered) = oneshot::channel();
        let pending = {
            let mut state = shared.state();
            let id = state.next_id;
            state.next_id += 1;
            state.pending.insert(id, answer);
            Pending { shared, id }
        };
        // Checked after the registration: a connection that closes later clears it.
        if let Some(why) = shared.closed.borrow().clone() {
            return Err(why);
        }
        let mut message = json!({ "execute": command, "id": pending.id });
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let deadline = Instant::now() + timeout;
        let answered = async {
            if self.inner.lines.send(message.to_string()).await.is_err() {
                return Err(shared.why_closed());
            }
            match answered.await {
                Ok(Ok(value)) => Ok(value),
                Ok(Err((class, description))) => {
                    Err(QmpError::Refused { command: command.to_owned(), class, description })
                }
                Err(_) => Err(shared.why_closed()),
            }
        };
        timeout_at(deadline, answered)
            .await
            .unwrap_or_else(|_| Err(QmpError::Timeout { command: command.to_owned(), timeout_ms: millis(timeout) }))
    }

    /// Events: the first call gets all since the connection was made, later ones those from then on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<QmpEvent> {
        let first = self.inner.first_events.lock().unwrap_or_else(PoisonError::into_inner).take();
        first.unwrap_or_else(|| self.inner.shared.events.subscribe())
    }

    /// Waits until the connection is gone and says why. All events that came before are in the receivers by then.
    pub async fn closed(&self) -> QmpError {
        let mut closed = self.inner.shared.closed.subscribe();
        let _ = closed.wait_for(Option::is_some).await;
        self.inner.shared.why_closed()
    }
}

/// Forgets a command whose caller no longer waits.
struct Pending<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.shared.state().pending.remove(&self.id);
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Whole lines only: a caller that gives up must not leave half a command on the wire. Ends, and with it the socket, when the reading side has.
async fn write_all(mut write: OwnedWriteHalf, mut lines: mpsc::Receiver<String>, shared: Arc<Shared>) {
    let mut closed = shared.closed.subscribe();
    let writing = async {
        while let Some(mut line) = lines.recv().await {
            line.push('\n');
            if let Err(error) = write.write_all(line.as_bytes()).await {
                // Whoever waits for this command is told by the reading side, which first takes in what was still sent.
                tracing::debug!(%error, "the QMP socket no longer takes commands");
                return;
            }
        }
    };
    tokio::select! {
        () = writing => {}
        _ = closed.wait_for(Option::is_some) => return,
    }
    let _ = closed.wait_for(Option::is_some).await;
}

async fn read_all(mut reader: Lines<BufReader<OwnedReadHalf>>, shared: Arc<Shared>) {
    loop {
        match reader.next_matching(is_answer_or_event).await {
            Ok(message) => dispatch(message, &shared),
            Err(why) => return shared.close(why),
        }
    }
}

fn is_answer_or_event(message: &Value) -> bool {
    message.get("event").is_some_and(Value::is_string)
        || (message.get("id").is_some() && (message.get("return").is_some() || message.get("error").is_some()))
}

fn dispatch(mut message: Value, shared: &Shared) {
    if let Some(name) = message.get("event").and_then(Value::as_str) {
        let event = QmpEvent {
            name: name.to_owned(),
            data: message.get("data").cloned().unwrap_or_default(),
            timestamp_us: timestamp_us(&message),
            raw: message,
        };
        // No receiver is no error: nobody listens at the moment.
        let _ = shared.events.send(event);
        return;
    }
    let waiting = message.get("id").and_then(Value::as_u64).and_then(|id| shared.state().pending.remove(&id));
    let Some(waiting) = waiting else {
        tracing::debug!(id = %message["id"], "QMP answer that nobody waits for (any more)");
        return;
    };
    let answer = match message.get("error") {
        None => Ok(message["return"].take()),
        Some(error) => {
            let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or("(none)").to_owned();
            Err((text("class"), text("desc")))
        }
    };
    let _ = waiting.send(answer);
}

fn timestamp_us(message: &Value) -> Option<u64> {
    let timestamp = message.get("timestamp")?;
    // QEMU sends -1 where it could not read the clock.
    let part = |key: &str| timestamp.get(key).and_then(Value::as_u64);
    part("seconds")?.checked_mul(1_000_000)?.checked_add(part("microseconds")?)
}

struct Lines<R> {
    from: R,
    garbage: u32,
}

impl<R: AsyncBufRead + Unpin> Lines<R> {
    /// The next JSON object that `wanted` takes; anything else is counted as garbage.
    async fn next_matching(&mut self, wanted: impl Fn(&Value) -> bool) -> Result<Value, QmpError> {
        loop {
            let line = self.next_line().await?;
            if let Ok(message @ Value::Object(_)) = serde_json::from_slice::<Value>(&line)
                && wanted(&message)
            {
                return Ok(message);
            }
            self.garbage += 1;
            let shown = String::from_utf8_lossy(&line[..line.len().min(120)]).into_owned();
            if self.garbage > GARBAGE_LINES_MAX {
                return Err(QmpError::Protocol {
                    what: format!("more than {GARBAGE_LINES_MAX} lines that make no sense, the last: {shown:?}"),
                });
            }
            tracing::debug!(line = %shown, "QMP line that makes no sense");
        }
    }

    async fn next_line(&mut self) -> Result<Vec<u8>, QmpError> {
        let mut line = Vec::new();
        loop {
            let buffered = self.from.fill_buf().await.map_err(|error| QmpError::Closed { what: error.to_string() })?;
            if buffered.is_empty() {
                return Err(QmpError::Closed { what: "by QEMU".to_owned() });
            }
            let newline = buffered.iter().position(|&b| b == b'\n');
            let used = newline.map_or(buffered.len(), |at| at + 1);
            line.extend_from_slice(&buffered[..newline.unwrap_or(used)]);
            self.from.consume(used);
            if line.len() > LINE_MAX_BYTES {
                return Err(QmpError::Protocol { what: format!("a line of more than {LINE_MAX_BYTES} bytes") });
            }
            if newline.is_some() && !line.iter().all(u8::is_ascii_whitespace) {
                return Ok(line);
            }
            if newline.is_some() {
                line.clear();
            }
        }
    }
}
