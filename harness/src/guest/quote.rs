//! Words made safe for a POSIX shell.

/// Quotes one word so that a POSIX shell takes it literally, whatever is in it.
///
/// A NUL byte cannot be passed in a command line at all; it is removed.
pub fn quote(word: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-./:=@%+,".contains(&b);
    if !word.is_empty() && word.bytes().all(plain) && !word.starts_with(['-', '=']) {
        return word.to_owned();
    }
    let mut quoted = String::with_capacity(word.len() + 2);
    quoted.push('\'');
    for c in word.chars().filter(|c| *c != '\0') {
        match c {
            '\'' => quoted.push_str(r"'\''"),
            c => quoted.push(c),
        }
    }
    quoted.push('\'');
    quoted
}

#[cfg(test)]
mod tests {
    use super::quote;

    #[test]
    fn plain_words_stay_and_all_others_come_back_from_a_shell_unchanged() {
        assert_eq!(quote("/etc/default/k3s-server"), "/etc/default/k3s-server");
        assert_eq!(quote(""), "''");
        assert_eq!(quote("a\0b"), "'ab'");
        for word in [
            "it's",
            "a b",
            "$(reboot)",
            "`id`",
            "a\nb",
            "\"",
            "\\",
            "-rf",
            "*",
            "~root",
            "ä€",
            "'''",
            "=ls",
            "!x;&|<>#",
        ] {
            let out =
                std::process::Command::new("sh").args(["-c", &format!("printf %s {}", quote(word))]).output().unwrap();
            assert_eq!(String::from_utf8(out.stdout).unwrap(), word);
        }
    }
}
