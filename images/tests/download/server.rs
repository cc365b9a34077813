//! An HTTP/1.1 server on loopback that misbehaves as it is told.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// A request's head.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) line: String,
    pub(crate) headers: BTreeMap<String, String>,
}

impl Request {
    pub(crate) fn path(&self) -> &str {
        self.line.split(' ').nth(1).unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// Where a range asks to begin.
    pub(crate) fn range(&self) -> Option<usize> {
        self.header("range")
            .map(|range| range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse().unwrap())
    }
}

/// What a connection does after a request; then it is closed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reply {
    bytes: Vec<u8>,
    then: Then,
}

/// What follows the bytes of a reply.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Then {
    #[default]
    Close,
    Hang,
    Drip,
}

impl Reply {
    pub(crate) fn raw(text: impl Into<Vec<u8>>) -> Self {
        Self { bytes: text.into(), then: Then::Close }
    }

    pub(crate) fn new(status: &str, headers: &[(&str, &str)], body: &[u8]) -> Self {
        let mut text = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
        for (name, value) in headers {
            text += &format!("{name}: {value}\r\n");
        }
        Self::raw([(text + "\r\n").as_bytes(), body].concat())
    }

    pub(crate) fn ok(body: &[u8]) -> Self {
        Self::new("200 OK", &[("ETag", "\"one\"")], body)
    }

    /// The rest of `whole` from `start`.
    pub(crate) fn rest(whole: &[u8], start: usize, etag: &str) -> Self {
        let range = format!("bytes {start}-{}/{}", whole.len() - 1, whole.len());
        Self::new("206 Partial Content", &[("ETag", etag), ("Content-Range", &range)], &whole[start..])
    }

    /// As it is, but only so much of its body; `whole` is the body's length.
    pub(crate) fn cut(mut self, whole: usize, keep: usize) -> Self {
        self.bytes.truncate(self.bytes.len() - (whole - keep));
        self
    }

    /// As it is, and then silence instead of the connection's end.
    pub(crate) fn hang(mut self) -> Self {
        self.then = Then::Hang;
        self
    }

    /// As it is, and then a byte every now and then.
    pub(crate) fn drip(mut self) -> Self {
        self.then = Then::Drip;
        self
    }
}

/// The server; it ends with this value.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    /// Serves what `answer` says to a request and its number among those for the same path, from 1.
    pub(crate) async fn start(answer: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Self {
        Self::rude(0, answer).await
    }

    /// As `start`, but the first `resets` connections are reset before the request is read.
    pub(crate) async fn rude(resets: usize, answer: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let answer = Arc::new(answer);
        let seen = Arc::clone(&requests);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            for number in 0.. {
                let (mut stream, _) = listener.accept().await.unwrap();
                if number < resets {
                    // What is left unread makes the system answer with a reset.
                    stream.read_u8().await.unwrap();
                    continue;
                }
                let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
                connections.spawn(async move { serve(stream, &seen, &*answer).await });
            }
        });
        Self { address, requests, task }
    }

    pub(crate) fn base(&self) -> String {
        format!("http://{}/r", self.address)
    }

    /// The requests whose path ends so.
    pub(crate) fn asked(&self, end: &str) -> Vec<Request> {
        self.requests.lock().unwrap().iter().filter(|request| request.path().ends_with(end)).cloned().collect()
    }
}

async fn serve(mut stream: TcpStream, seen: &Mutex<Vec<Request>>, answer: &(dyn Fn(&Request, usize) -> Reply + Sync)) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines();
    let line = lines.next().unwrap().to_owned();
    let headers = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let request = Request { line, headers };
    let number = {
        let mut seen = seen.lock().unwrap();
        seen.push(request.clone());
        seen.iter().filter(|other| other.path() == request.path()).count()
    };
    let reply = answer(&request, number);
    // A client that left is no fault of the server's.
    let _ = stream.write_all(&reply.bytes).await;
    let _ = stream.flush().await;
    match reply.then {
        Then::Close => {}
        Then::Hang => std::future::pending().await,
        Then::Drip => {
            let mut pace = tokio::time::interval(std::time::Duration::from_millis(20));
            while stream.write_u8(7).await.is_ok() {
                pace.tick().await;
            }
        }
    }
}
