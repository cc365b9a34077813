//! Goroutine dumps: up to 25,000 lines after a Go program's fatal error, of no use to a classifier.

/// Whether a program's line belongs to a goroutine dump: a goroutine's header, a frame, or a frame's file.
#[must_use]
pub fn is_goroutine_dump(message: &[u8]) -> bool {
    if message.starts_with(b"goroutine ") && (message.ends_with(b":") || message.ends_with(b"]")) {
        return true;
    }
    if message.starts_with(b"created by ") {
        return true;
    }
    let trimmed = message.trim_ascii_start();
    // `\t/go/src/…/leaderelection.go:278 +0xa7`
    if trimmed.starts_with(b"/") && contains(trimmed, b".go:") && !contains(trimmed, b" msg") {
        return true;
    }
    // `k8s.io/client-go/tools/leaderelection.(*LeaderElector).renew(0xc0007d6a20, …)`
    let call = message.ends_with(b")") && !message.starts_with(b"panic");
    call && message.iter().position(|&b| b == b'(').is_some_and(|open| {
        let path = &message[..open];
        path.contains(&b'.')
            && path.contains(&b'/')
            && path.iter().all(|b| b.is_ascii_alphanumeric() || b"./_-@~".contains(b))
    })
}

fn contains(text: &[u8], needle: &[u8]) -> bool {
    text.windows(needle.len()).any(|w| w == needle)
}

#[cfg(test)]
mod tests {
    use super::is_goroutine_dump;

    #[test]
    fn frames_are_recognised_and_the_panic_itself_is_not() {
        for line in [
            "goroutine 331 [running]:",
            "goroutine 1 [chan receive, 2 minutes]:",
            "created by k8s.io/client-go/tools/leaderelection.RunOrDie in goroutine 7",
            "\t/go/src/k8s.io/client-go/tools/leaderelection/leaderelection.go:278 +0xa7",
            "github.com/k3s-io/k3s/pkg/cluster.(*Cluster).Start.func1(0xc000d04eb8)",
        ] {
            assert!(is_goroutine_dump(line.as_bytes()), "{line}");
        }
        for line in [
            "panic: bootstrap data already found and encrypted with different token",
            "F1121 02:44:00.872970       1 server.go:205] leaderelection lost",
            "/usr/local/bin/k3s: cannot execute binary file: Exec format error",
            "",
        ] {
            assert!(!is_goroutine_dump(line.as_bytes()), "{line}");
        }
    }
}
