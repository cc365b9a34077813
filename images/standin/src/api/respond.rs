//! Answers: bodies, JSON, Kubernetes' Status objects.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::body::{Bytes, Frame};
use hyper::header::CONTENT_TYPE;
use hyper::{Response, StatusCode};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::nodes::NodeError;

/// A whole answer, or one that goes on as chunks come.
pub(crate) enum Body {
    Whole(Option<Bytes>),
    Stream(mpsc::Receiver<Bytes>),
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Self::Stream(receiver) => receiver.poll_recv(cx).map(|b| b.map(|b| Ok(Frame::data(b)))),
        }
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        match self {
            Self::Whole(bytes) => {
                let len = bytes.as_ref().map_or(0, Bytes::len);
                hyper::body::SizeHint::with_exact(u64::try_from(len).unwrap_or(u64::MAX))
            }
            Self::Stream(_) => hyper::body::SizeHint::default(),
        }
    }
}

fn answer(status: u16, content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    response
}

pub(super) fn text(status: u16, body: &str) -> Response<Body> {
    answer(status, "text/plain; charset=utf-8", Body::Whole(Some(Bytes::copy_from_slice(body.as_bytes()))))
}

pub(super) fn bytes(body: Vec<u8>) -> Response<Body> {
    answer(200, "application/octet-stream", Body::Whole(Some(Bytes::from(body))))
}

pub(super) fn empty(status: u16) -> Response<Body> {
    answer(status, "text/plain; charset=utf-8", Body::Whole(None))
}

pub(super) fn json(status: u16, body: &Value) -> Response<Body> {
    answer(status, "application/json", Body::Whole(Some(Bytes::from(body.to_string()))))
}

pub(super) fn stream(receiver: mpsc::Receiver<Bytes>) -> Response<Body> {
    answer(200, "application/json", Body::Stream(receiver))
}

/// A Status object.
pub(super) fn status_object(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    })
}

pub(super) fn status(code: u16, reason: &str, message: &str) -> Response<Body> {
    json(code, &status_object(code, reason, message))
}

/// The 401 of an API server, to the byte as measured.
pub(super) fn unauthorized() -> Response<Body> {
    let body = "{\n  \"kind\": \"Status\",\n  \"apiVersion\": \"v1\",\n  \"metadata\": {\n    \n  },\n  \"status\": \"Failure\",\n  \"message\": \"Unauthorized\",\n  \"reason\": \"Unauthorized\",\n  \"code\": 401\n}";
    answer(401, "application/json", Body::Whole(Some(Bytes::from_static(body.as_bytes()))))
}

pub(super) fn node_error(error: &NodeError) -> Response<Body> {
    let message = error.to_string();
    match error {
        NodeError::AlreadyExists(_) => status(409, "AlreadyExists", &message),
        NodeError::NotFound(_) => status(404, "NotFound", &message),
        NodeError::Conflict(_) => status(409, "Conflict", &message),
        NodeError::Invalid(_) => status(422, "Invalid", &message),
        NodeError::Etcd(_) => status(500, "InternalError", &message),
    }
}
