use crate::job::End;
use crate::program::mpirun_with;

/// As between machines: no shared memory, and rank 0 hears of nothing while it computes.
const NETWORK: [&str; 3] = ["--mca", "btl", "self,tcp"];

fn run(ranks: usize, word: &str) -> End {
    let end = mpirun_with(&NETWORK, ranks, word, &[]).finish();
    end.assert_success().assert_nothing_left(ranks);
    end
}

/// `NAME N` in the line of rank 0, in milliseconds.
fn figure(end: &End, name: &str) -> f64 {
    let said = end.said.split(&format!(" {name} ")).nth(1);
    let number = said.and_then(|rest| rest.split_whitespace().next());
    number.unwrap_or_else(|| panic!("no {name} in:\n{}", end.said)).parse().unwrap()
}

/// The wait is measured against the longest step that rank 0 has really made in the same run.
#[test]
fn no_group_waits_longer_than_a_step_of_rank_0() {
    for (ranks, word) in [(3, "queue"), (4, "queue-pairs")] {
        let end = run(ranks, word);
        let (step, longest) = (figure(&end, "step"), figure(&end, "longest"));
        assert!(
            longest <= step * 1.5,
            "waited {longest} ms, a step takes {step} ms:\n{}",
            end.said
        );
        assert!(longest >= step * 0.1, "rank 0 was never busy, nothing was tested:\n{}", end.said);
    }
}

#[test]
fn a_rank_0_that_does_not_answer_makes_the_others_wait() {
    let end = run(3, "queue-deaf");
    let (step, longest) = (figure(&end, "step"), figure(&end, "longest"));
    assert!(longest > step * 3.0, "waited {longest} ms, a step takes {step} ms:\n{}", end.said);
}

/// A row takes a group longer than a step of rank 0: the answer is there before it is needed.
#[test]
fn asking_ahead_hides_the_wait() {
    let end = run(3, "queue-ahead");
    let (step, total) = (figure(&end, "step"), figure(&end, "total"));
    assert!(total < step * 0.5, "waited {total} ms behind the first block:\n{}", end.said);
}

/// The groups end far apart, and the end of the job is no collective with a deadline.
#[test]
fn groups_may_end_far_apart() {
    let variables = [("DROMEDARY_COLLECTIVE_TIMEOUT", "1")];
    let end = mpirun_with(&[], 2, "late-end", &variables).finish();
    end.assert_success().assert_nothing_left(2);
}
