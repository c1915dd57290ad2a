use std::{fs, path::Path};

use crate::{
    job::Job,
    parallel::{
        ADAPTERS, Dims, ONE, WEIGHTS, assert_same_run, metrics, on_threads, trained, under_mpirun,
    },
};

/// What is divided over replicas comes to the same: values and moments to the bit where the sums have one
/// order only.
#[test]
fn what_is_divided_changes_nothing() {
    let job = Job::new(27);
    let sixteen = [WEIGHTS[0], WEIGHTS[1], "--dtype", "bf16"];
    let cases: [(&str, &[&str]); 3] =
        [("adapters", &ADAPTERS), ("weights", &WEIGHTS), ("sixteen-bit", &sixteen)];
    for (name, more) in cases {
        let one = job.path(&format!("one-{name}"));
        on_threads(&job, ONE, &one, more);
        let divided = [more, &["--shard-optimizer"]].concat();
        for dims in [Dims { dp: 2, tp: 1 }, Dims { dp: 4, tp: 1 }, Dims { dp: 2, tp: 2 }] {
            let plain = job.path(&dims.name(&format!("plain-{name}")));
            under_mpirun(&job, dims, &plain, more).assert_success();
            let out = job.path(&dims.name(&format!("divided-{name}")));
            under_mpirun(&job, dims, &out, &divided).assert_success();
            let same = |one: &Path, other: &Path| {
                let steps = metrics(one).len();
                let file = |dir: &Path| {
                    fs::read(dir.join(format!("checkpoint-{steps}/optimizer.safetensors"))).unwrap()
                };
                let results = trained(one).into_iter().zip(trained(other));
                file(one) == file(other) && results.into_iter().all(|(one, other)| one == other)
            };
            // With two addends a sum has one order only.
            assert!(dims.dp > 2 || same(&out, &plain), "{}", dims.name(name));
            match name {
                // A rounding to the other side is as large as the last bit of a weight.
                "sixteen-bit" => assert_similar_losses(&out, &one),
                _ => assert_same_run(&out, &one),
            }
            // The other way round too: what one has saved, the other goes on from.
            if dims.dp == 2 && dims.tp == 1 {
                for (dir, flags) in [(&plain, &divided[..]), (&out, more)] {
                    let steps = metrics(dir).len();
                    for name in [&format!("checkpoint-{steps}"), "adapter", "model"] {
                        let _ = fs::remove_dir_all(dir.join(name));
                    }
                    under_mpirun(&job, dims, dir, flags).assert_said("going on behind step 4");
                }
                assert!(same(&out, &plain), "{} after the exchange", dims.name(name));
            }
        }
    }
}

#[track_caller]
fn assert_similar_losses(got: &Path, want: &Path) {
    let losses = |dir| metrics(dir).iter().map(|step| step["loss"].as_f64().unwrap()).collect();
    let (got, want): (Vec<f64>, Vec<f64>) = (losses(got), losses(want));
    assert_eq!(got.len(), want.len());
    let far = |(got, want): (&f64, &f64)| (got / want - 1.0).abs() > 1e-2;
    assert!(!got.iter().zip(&want).any(far), "{got:?}, not {want:?}");
}
