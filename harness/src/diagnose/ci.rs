//! What CI systems do to logs.

use std::collections::HashSet;

use crate::diagnose::tree::Member;

/// Files of GitHub's log archives that repeat others: beside `0_build.txt`, the log of the job `build`, there is a folder
/// `build/` with a file for each step, `3_Run tests.txt`. Gives the keys of the steps' files.
pub(super) fn steps_told_twice(members: &[Member]) -> HashSet<usize> {
    let jobs: HashSet<&str> =
        members.iter().filter(|one| !one.path.contains('/')).filter_map(|one| numbered(&one.path)).collect();
    let is_step =
        |path: &str| path.split_once('/').is_some_and(|(job, file)| jobs.contains(job) && numbered(file).is_some());
    members.iter().filter(|one| is_step(&one.path)).map(|one| one.key).collect()
}

/// `NAME` of `7_NAME.txt`.
fn numbered(file: &str) -> Option<&str> {
    let (number, name) = file.strip_suffix(".txt")?.split_once('_')?;
    (!number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) && !name.contains('/')).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_steps_of_a_job_with_a_log_of_its_own_are_left_out() {
        let paths = [
            "0_build.txt",
            "build/1_Set up job.txt",
            "build/system.txt",
            "build/sub/1_x.txt",
            "vm/1_Run.txt",
            "notes.txt",
        ];
        let members: Vec<Member> =
            paths.iter().enumerate().map(|(key, path)| Member { path: (*path).to_owned(), bytes: 1, key }).collect();
        assert_eq!(steps_told_twice(&members), HashSet::from([1]));
    }
}
