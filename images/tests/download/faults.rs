//! Servers and lines that fail in the middle, and answers that are refusals.

use std::time::Instant;

use super::*;

#[tokio::test]
async fn a_cut_download_goes_on_where_it_stopped() {
    let bench = Bench::new();
    let server = site(&k3s(), |request, _| match request.range() {
        None => Reply::ok(&k3s()).cut(700_000, 300_001),
        Some(start) if start < 500_000 => {
            let rest = 700_000 - start;
            Reply::rest(&k3s(), start, "\"one\"").cut(rest, 500_000 - start)
        }
        Some(start) => Reply::rest(&k3s(), start, "\"one\""),
    })
    .await;
    bench.fetch(&server.base()).await.unwrap();
    let asked = server.asked("/k3s");
    let ranges: Vec<_> = asked.iter().map(Request::range).collect();
    assert_eq!(ranges, [None, Some(300_001), Some(500_000)]);
    assert_eq!(asked[1].header("if-range"), Some("\"one\""));
    assert_eq!(asked[1].header("accept-encoding"), Some("identity"));
    assert!(bench.retries()[0].0.contains("the connection broke"), "{:?}", bench.retries());
    assert!(
        bench.has(|event| matches!(event, DownloadEvent::Started { resumed_from: 300_001, total: Some(700_000), .. }))
    );
    assert_eq!(std::fs::read(bench.folder().join("k3s")).unwrap(), k3s());
}

#[tokio::test]
async fn a_server_that_knows_no_ranges_sends_everything_again() {
    let bench = Bench::new();
    let server = site(&k3s(), |_, number| match number {
        1 => Reply::ok(&k3s()).cut(700_000, 300_000),
        _ => Reply::ok(&k3s()),
    })
    .await;
    bench.fetch(&server.base()).await.unwrap();
    assert_eq!(server.asked("/k3s")[1].range(), Some(300_000));
    assert_eq!(std::fs::read(bench.folder().join("k3s")).unwrap(), k3s());
}

#[tokio::test]
async fn a_file_that_changes_between_the_parts_is_not_put_together() {
    let old = || program(62, 650_000);
    // By the book: If-Range no longer holds, so the whole of the new one comes.
    let bench = Bench::new();
    let server = site(&k3s(), move |request, _| match (request.range(), request.header("if-range")) {
        (None, _) => Reply::new("200 OK", &[("ETag", "\"old\"")], &old()).cut(650_000, 300_000),
        (Some(_), Some("\"old\"")) => Reply::new("200 OK", &[("ETag", "\"new\"")], &k3s()),
        other => panic!("{other:?}"),
    })
    .await;
    bench.fetch(&server.base()).await.unwrap();
    assert_eq!(server.asked("/k3s").len(), 2);

    // A server that ignores If-Range and shows another tag, or another length.
    for tag in ["\"new\"", "\"old\""] {
        let bench = Bench::new();
        let server = site(&k3s(), move |request, number| match (number, request.range()) {
            (1, _) => Reply::new("200 OK", &[("ETag", "\"old\"")], &old()).cut(650_000, 300_000),
            (2, Some(start)) => Reply::rest(&k3s(), start, tag),
            (3, None) => Reply::ok(&k3s()),
            other => panic!("{other:?}"),
        })
        .await;
        bench.fetch(&server.base()).await.unwrap();
        assert!(bench.retries()[1].0.contains("cannot be continued: it was"), "{:?}", bench.retries());
    }

    // One that gives nothing to tell the two by: the digest does.
    let bench = Bench::new();
    let server = site(&k3s(), |request, number| match (number, request.range()) {
        (1, _) => Reply::new("200 OK", &[], &[9; 700_000]).cut(700_000, 300_000),
        (2, Some(start)) => Reply::rest(&k3s(), start, "W/\"weak\""),
        (3, None) => Reply::ok(&k3s()),
        other => panic!("{other:?}"),
    })
    .await;
    bench.fetch(&server.base()).await.unwrap();
    assert_eq!(server.asked("/k3s")[1].header("if-range"), None);
    assert!(bench.has(|event| matches!(event, DownloadEvent::Restarted { .. })));
    assert_eq!(std::fs::read(bench.folder().join("k3s")).unwrap(), k3s());
}

#[tokio::test]
async fn a_server_that_breaks_off_and_lies_is_not_asked_for_ever() {
    let bench = Bench::new();
    let server = site(&k3s(), |request, _| match request.range() {
        None => Reply::new("200 OK", &[], &[9; 700_000]).cut(700_000, 300_000),
        Some(start) => Reply::rest(&[9; 700_000], start, "W/\"weak\""),
    })
    .await;
    let error = bench.fetch(&server.base()).await.unwrap_err();
    assert!(matches!(error, DownloadError::Digest { .. }), "{error}");
    assert_eq!(server.asked("/k3s").len(), 4, "put together twice");
    assert_eq!(bench.files(), Vec::<String>::new());
}

#[tokio::test]
async fn a_part_longer_than_the_file_is_given_up() {
    let bench = Bench::new();
    let server = site(&k3s(), |request, number| match (number, request.range()) {
        (1, _) => Reply::ok(&k3s()).cut(700_000, 300_000),
        (2, Some(_)) => Reply::new("416 Range Not Satisfiable", &[("Content-Range", "bytes */200000")], b""),
        (3, None) => Reply::ok(&k3s()),
        other => panic!("{other:?}"),
    })
    .await;
    bench.fetch(&server.base()).await.unwrap();
    assert!(bench.retries()[1].0.contains("has no byte 300000"), "{:?}", bench.retries());
}

#[tokio::test]
async fn a_silent_server_is_left_in_time() {
    let hasty = |base: &str| Options {
        connect_timeout: Duration::from_millis(300),
        stall_timeout: Duration::from_millis(300),
        ..options(base)
    };
    // In the middle of the body: what came is kept.
    let bench = Bench::new();
    let server = site(&k3s(), |request, _| match request.range() {
        None => Reply::ok(&k3s()).cut(700_000, 400_000).hang(),
        Some(start) => Reply::rest(&k3s(), start, "\"one\""),
    })
    .await;
    bench.fetch_with(&hasty(&server.base())).await.unwrap();
    assert_eq!(server.asked("/k3s")[1].range(), Some(400_000));
    assert!(bench.retries()[0].0.contains("stalled: next to nothing came within 0.3 s"), "{:?}", bench.retries());

    // Not silent, but as good as.
    let bench = Bench::new();
    let server = site(&k3s(), |_, number| match number {
        1 => Reply::ok(&k3s()).cut(700_000, 400_000).drip(),
        _ => Reply::ok(&k3s()),
    })
    .await;
    bench.fetch_with(&hasty(&server.base())).await.unwrap();
    assert!(bench.retries()[0].0.contains("stalled: next to nothing came"), "{:?}", bench.retries());

    // Before the answer, and every time.
    let bench = Bench::new();
    let server = site(&k3s(), |_, _| Reply::default().hang()).await;
    let began = Instant::now();
    let error = bench.fetch_with(&hasty(&server.base())).await.unwrap_err();
    assert!(error.to_string().contains("stalled: no answer came within 0.6 s"), "{error}");
    assert_eq!(server.asked("/k3s").len(), 4);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[tokio::test]
async fn lost_connections_are_tried_again() {
    let bench = Bench::new();
    let list = sums(&[("k3s", &k3s())]);
    let server = Server::rude(2, move |request, number| match (request.path().ends_with(".txt"), number) {
        (true, _) => Reply::ok(list.as_bytes()),
        (false, 1) => Reply::raw("HTTP/1.1 200 OK\r\nContent-Len"),
        (false, 2) => Reply::raw(""),
        (false, _) => Reply::ok(&k3s()),
    })
    .await;
    bench.fetch(&server.base()).await.unwrap();
    assert_eq!(bench.retries().len(), 4);
    assert!(bench.retries().iter().all(|(error, _)| error.contains("the connection broke")), "{:?}", bench.retries());
}

#[tokio::test]
async fn answers_that_may_pass_are_tried_again_and_no_others() {
    for code in ["500 Internal Server Error", "502 Bad Gateway", "503 Service Unavailable", "504 Gateway Timeout"] {
        let bench = Bench::new();
        let server = site(&k3s(), move |_, number| match number {
            1 => Reply::new(code, &[], b"later"),
            _ => Reply::ok(&k3s()),
        })
        .await;
        bench.fetch(&server.base()).await.unwrap();
        assert_eq!(server.asked("/k3s").len(), 2, "{code}");
    }
    for code in
        ["400 Bad Request", "401 Unauthorized", "403 Forbidden", "404 Not Found", "410 Gone", "501 Not Implemented"]
    {
        let bench = Bench::new();
        let server = site(&k3s(), move |_, _| Reply::new(code, &[], b"never")).await;
        let text = bench.fetch(&server.base()).await.unwrap_err().to_string();
        assert!(text.ends_with(&format!("/r/v9.9.9%2Bk3s1/k3s answered {code}")), "{text}");
        assert_eq!(server.asked("/k3s").len(), 1, "{code}");
    }
    let bench = Bench::new();
    let server = site(&k3s(), |_, _| Reply::new("503 Service Unavailable", &[], b"")).await;
    bench.fetch(&server.base()).await.unwrap_err();
    assert_eq!(server.asked("/k3s").len(), 4, "attempts are bounded");
}

#[tokio::test]
async fn a_pause_a_server_asks_for_is_kept_within_bounds() {
    let bench = Bench::new();
    let server = site(&k3s(), |_, number| match number {
        1 => Reply::new("429 Too Many Requests", &[("Retry-After", "1")], b""),
        _ => Reply::ok(&k3s()),
    })
    .await;
    let began = Instant::now();
    bench.fetch(&server.base()).await.unwrap();
    assert!(began.elapsed() >= Duration::from_millis(990), "{:?}", began.elapsed());
    assert_eq!(bench.retries()[0].1, Duration::from_secs(1));

    let bench = Bench::new();
    let server = site(&k3s(), |_, _| Reply::new("429 Too Many Requests", &[("Retry-After", "3600")], b"")).await;
    let text = bench.fetch(&server.base()).await.unwrap_err().to_string();
    assert!(text.ends_with("answered 429 Too Many Requests and asks to wait 3600 s"), "{text}");
    assert_eq!(server.asked("/k3s").len(), 1);
}

#[tokio::test]
async fn a_wrong_digest_is_final_and_leaves_nothing() {
    let bench = Bench::new();
    let server = site(&k3s(), |_, _| Reply::ok(&program(62, 1_000))).await;
    let text = bench.fetch(&server.base()).await.unwrap_err().to_string();
    assert!(text.contains(&digest(&k3s())) && text.contains(&digest(&program(62, 1_000))), "{text}");
    assert_eq!(server.asked("/k3s").len(), 1);
    assert_eq!(bench.files(), Vec::<String>::new());

    // A portal that answers everything with its page.
    let bench = Bench::new();
    let server = site(&k3s(), |_, _| Reply::ok(b"<!DOCTYPE html><title>Sign in</title>")).await;
    let text = bench.fetch(&server.base()).await.unwrap_err().to_string();
    assert!(text.ends_with("(it looks like a web page)"), "{text}");
    let bench = Bench::new();
    let server = Server::start(|_, _| Reply::ok(b"<!DOCTYPE html>")).await;
    let text = bench.fetch(&server.base()).await.unwrap_err().to_string();
    assert!(text.contains("sha256sum-amd64.txt is no list of sha256 sums: line 1 is \"<!DOCTYPE html>\""), "{text}");
}

#[tokio::test]
async fn answers_nobody_asked_for_are_refused_at_once() {
    let cases: [(Reply, &str); 4] = [
        (Reply::new("200 OK", &[("Content-Encoding", "gzip")], b"x"), "coding \"gzip\""),
        (Reply::rest(&k3s(), 5, "\"one\""), "206 Partial Content to a request for the whole"),
        (Reply::raw("SSH-2.0-OpenSSH_9.2\r\n\r\n"), "gave a wrong answer"),
        (Reply::new("200 OK", &[], b""), "(it is empty)"),
    ];
    for (reply, expected) in cases {
        let bench = Bench::new();
        let server = site(&k3s(), move |_, _| reply.clone()).await;
        let text = bench.fetch(&server.base()).await.unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
        assert_eq!(server.asked("/k3s").len(), 1, "{text}");
    }
    // Far more than there can be, announced or not.
    let huge = "HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n";
    let bench = Bench::new();
    let server = site(&k3s(), move |_, _| Reply::raw(huge).hang()).await;
    let text = bench.fetch(&server.base()).await.unwrap_err().to_string();
    assert!(text.contains("is larger than 536870912 bytes"), "{text}");
    let bench = Bench::new();
    let server =
        Server::start(|_, _| Reply::raw([b"HTTP/1.1 200 OK\r\n\r\n".as_slice(), &[b'a'; 300_000]].concat())).await;
    let text = bench.fetch(&server.base()).await.unwrap_err().to_string();
    assert!(text.contains("sha256sum-amd64.txt is larger than 262144 bytes"), "{text}");
}
