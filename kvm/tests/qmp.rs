//! The QMP client against a server that misbehaves.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there and then")]

use std::time::{Duration, Instant};

use camino::Utf8PathBuf;
use kvm::{Qmp, QmpError};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};

const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"major\": 7}}, \"capabilities\": [\"oob\"]}}\r\n";
const LONG: Duration = Duration::from_secs(5);
const SHORT: Duration = Duration::from_millis(100);

struct Server {
    lines: Lines<BufReader<OwnedReadHalf>>,
    write: OwnedWriteHalf,
}

impl Server {
    async fn accept(listener: UnixListener) -> Self {
        let (stream, _): (UnixStream, _) = listener.accept().await.unwrap();
        let (read, write) = stream.into_split();
        Self { lines: BufReader::new(read).lines(), write }
    }

    async fn negotiated(listener: UnixListener) -> Self {
        let mut server = Self::accept(listener).await;
        server.say(GREETING).await;
        let id = server.asked("qmp_capabilities").await;
        server.say(&format!("{}\r\n", json!({"return": {}, "id": id}))).await;
        server
    }

    async fn say(&mut self, text: &str) {
        self.write.write_all(text.as_bytes()).await.unwrap();
    }

    async fn asked(&mut self, command: &str) -> Value {
        let line = self.lines.next_line().await.unwrap().unwrap();
        let message: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(message["execute"], command);
        message["id"].clone()
    }

    async fn answer(&mut self, id: &Value, value: Value) {
        self.say(&format!("{}\r\n", json!({"return": value, "id": id}))).await;
    }
}

fn listen() -> (tempfile::TempDir, Utf8PathBuf, UnixListener) {
    let dir = tempfile::tempdir().unwrap();
    let path = Utf8PathBuf::from_path_buf(dir.path().join("qmp")).unwrap();
    let listener = UnixListener::bind(path.as_std_path()).unwrap();
    (dir, path, listener)
}

async fn connected() -> (tempfile::TempDir, Qmp, Server) {
    let (dir, path, listener) = listen();
    let (qmp, server) = tokio::join!(Qmp::connect(&path, LONG), Server::negotiated(listener));
    (dir, qmp.unwrap(), server)
}

#[tokio::test]
async fn commands_are_matched_by_id_and_events_keep_unknown_fields() {
    let (_dir, qmp, mut server) = connected().await;
    assert_eq!(qmp.greeting()["QMP"]["version"]["qemu"]["major"], 7);
    let mut events = qmp.events();
    let serve = async {
        let (one, two) = (server.asked("one").await, server.asked("two").await);
        server.say("{\"event\": \"NEVER_SEEN\", \"data\": {\"x\": [1]}, \"timestamp\": {\"seconds\": 2, \"microseconds\": 5}, \"extra\": true}\r\n").await;
        server.answer(&two, json!("second")).await;
        server.answer(&one, json!({"first": 1})).await;
        server
    };
    // joined in order: the commands are written one after the other.
    let (one, two, mut server) =
        tokio::join!(qmp.execute("one", Value::Null, LONG), qmp.execute("two", json!({"a": 1}), LONG), serve);
    assert_eq!((one.unwrap(), two.unwrap()), (json!({"first": 1}), json!("second")));
    let event = events.recv().await.unwrap();
    assert_eq!((event.name.as_str(), event.timestamp_us), ("NEVER_SEEN", Some(2_000_005)));
    assert_eq!((event.data, event.raw["extra"].clone()), (json!({"x": [1]}), json!(true)));

    let refuse = async {
        let id = server.asked("bad").await;
        server
            .say(&format!("{}\n", json!({"error": {"class": "GenericError", "desc": "no such thing"}, "id": id})))
            .await;
    };
    let (refused, ()) = tokio::join!(qmp.execute("bad", Value::Null, LONG), refuse);
    assert_eq!(refused.unwrap_err().to_string(), "QMP bad refused: GenericError: no such thing");
}

#[tokio::test]
async fn no_greeting_and_no_socket_time_out() {
    let (_dir, path, listener) = listen();
    let (result, _server) = tokio::join!(Qmp::connect(&path, SHORT), Server::accept(listener));
    assert_eq!(result.unwrap_err(), QmpError::Timeout { command: "greeting".into(), timeout_ms: 100 });
    let begin = Instant::now();
    let error = Qmp::connect(&path.with_file_name("nobody"), SHORT).await.unwrap_err();
    assert!(matches!(error, QmpError::Connect { .. }) && begin.elapsed() < Duration::from_secs(2), "{error}");
}

#[tokio::test]
async fn a_socket_that_appears_late_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = Utf8PathBuf::from_path_buf(dir.path().join("qmp")).unwrap();
    let late = async {
        tokio::time::sleep(Duration::from_millis(80)).await;
        Server::negotiated(UnixListener::bind(path.as_std_path()).unwrap()).await
    };
    let (result, _server) = tokio::join!(Qmp::connect(&path, LONG), late);
    result.unwrap();
}

#[tokio::test]
async fn late_and_wrong_answers_do_not_reach_the_next_command() {
    let (_dir, qmp, mut server) = connected().await;
    assert_eq!(
        qmp.execute("stalled", Value::Null, SHORT).await.unwrap_err(),
        QmpError::Timeout { command: "stalled".into(), timeout_ms: 100 }
    );
    let serve = async {
        let stalled = server.asked("stalled").await;
        let next = server.asked("next").await;
        server.answer(&stalled, json!("late")).await;
        server.answer(&json!(999), json!("nobody's")).await;
        server.answer(&json!("text"), json!("no number")).await;
        server.answer(&next, json!("mine")).await;
        server.answer(&next, json!("twice")).await;
    };
    let (next, ()) = tokio::join!(qmp.execute("next", Value::Null, LONG), serve);
    assert_eq!(next.unwrap(), json!("mine"));
}

#[tokio::test]
async fn a_close_reaches_all_who_wait() {
    let (_dir, qmp, mut server) = connected().await;
    let close = async {
        server.asked("one").await;
        server.say("{\"event\": \"SHUTDOWN\"}\n").await;
        drop(server);
    };
    let mut events = qmp.events();
    let (one, ()) = tokio::join!(qmp.execute("one", Value::Null, LONG), close);
    assert_eq!(one.unwrap_err(), QmpError::Closed { what: "by QEMU".into() });
    assert_eq!(qmp.closed().await, QmpError::Closed { what: "by QEMU".into() });
    assert_eq!(events.try_recv().unwrap().name, "SHUTDOWN");
    assert!(matches!(qmp.execute("two", Value::Null, LONG).await, Err(QmpError::Closed { .. })));
}

#[tokio::test]
async fn garbage_is_put_up_with_up_to_a_bound() {
    let (_dir, qmp, mut server) = connected().await;
    let serve = async {
        let id = server.asked("one").await;
        server.say("not json\n\n[1, 2]\n{\"unknown\": 1}\n\u{fffd}\n").await;
        // A megabyte in one line, which is valid: events may be large.
        server.say(&format!("{}\n", json!({"event": "BIG", "data": "x".repeat(1 << 20)}))).await;
        server.answer(&id, json!(1)).await;
    };
    let mut events = qmp.events();
    let (one, ()) = tokio::join!(qmp.execute("one", Value::Null, LONG), serve);
    one.unwrap();
    assert_eq!(events.recv().await.unwrap().data.as_str().unwrap().len(), 1 << 20);
    server.say(&"noise\n".repeat(100)).await;
    assert!(matches!(qmp.closed().await, QmpError::Protocol { .. }));
}

#[tokio::test]
async fn an_endless_line_ends_the_connection() {
    let (_dir, qmp, mut server) = connected().await;
    let flood = async {
        let chunk = vec![b'x'; 1 << 16];
        // More than the bound; the client hangs up somewhere on the way.
        for _ in 0..200 {
            if server.write.write_all(&chunk).await.is_err() {
                break;
            }
        }
    };
    let (why, ()) = tokio::join!(qmp.closed(), async { tokio::time::timeout(LONG, flood).await.unwrap_or_default() });
    assert!(matches!(why, QmpError::Protocol { .. }), "{why}");
}
