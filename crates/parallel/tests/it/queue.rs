use crate::job::End;
use crate::program::mpirun_with;

/// As between machines: no shared memory, and rank 0 hears of nothing while it computes.
const NETWORK: [&str; 3] = ["--mca", "btl", "self,tcp"];

fn run(ranks: usize, word: &str) -> End {
    let end = mpirun_with(&NETWORK, ranks, word, &[]).finish();
    end.assert_success().assert_nothing_left(ranks);
    end
}

/// Ends well where one of a few runs is as it should be. Times of processes are compared, and a machine that
/// does something else for the moment makes any of them longer; what is wrong is wrong in every run.
#[track_caller]
fn assert_in_one_of_a_few(ranks: usize, word: &str, is_so: impl Fn(&End) -> bool) {
    let mut said = String::new();
    for _ in 0..5 {
        let end = run(ranks, word);
        if is_so(&end) {
            return;
        }
        said += &format!("{}\n\n", end.said);
    }
    panic!("not in one of these runs:\n{said}");
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
        assert_in_one_of_a_few(ranks, word, |end| {
            let (step, longest) = (figure(end, "step"), figure(end, "longest"));
            // A wait of nothing would mean that rank 0 was never busy, and nothing tested.
            (step * 0.1..=step * 1.5).contains(&longest)
        });
    }
}

#[test]
fn a_rank_0_that_does_not_answer_makes_the_others_wait() {
    assert_in_one_of_a_few(3, "queue-deaf", |end| {
        figure(end, "longest") > figure(end, "step") * 3.0
    });
}

/// A row takes a group longer than a step of rank 0: the answer is there before it is needed.
#[test]
fn asking_ahead_hides_the_wait() {
    assert_in_one_of_a_few(3, "queue-ahead", |end| {
        figure(end, "total") < figure(end, "step") * 0.5
    });
}

/// The groups end further apart than a collective may take: the end of the job is none.
#[test]
fn groups_may_end_far_apart() {
    let variables = [("DROMEDARY_COLLECTIVE_TIMEOUT", "5")];
    let end = mpirun_with(&[], 2, "late-end", &variables).finish();
    end.assert_success().assert_nothing_left(2);
}
