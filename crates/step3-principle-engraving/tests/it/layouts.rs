use std::{fs, path::Path};

use dromedary_llama::{AdapterFile, Checkpoint, Llama, LoadOptions};
use dromedary_parallel::Communicator;
use tch::Tensor;

use crate::{
    job::Job,
    parallel::{
        Dims, ONE, WEIGHTS, checkpoints, largest, on_ranks, on_threads, trained, under_mpirun,
    },
    support::stories260k,
};

/// Layouts that write; all of these and tp 3 read.
const WRITERS: [Dims; 4] =
    [ONE, Dims { dp: 2, tp: 1 }, Dims { dp: 1, tp: 2 }, Dims { dp: 2, tp: 2 }];
const THREE: Dims = Dims { dp: 1, tp: 3 };
const TEXT: [u32; 8] = [1, 403, 407, 261, 378, 432, 383, 290];
const STEPS: [&str; 4] = ["--max-steps", "3", "--learning-rate", "1e-2"];

/// Logits of what a run has left, as `tp` ranks compute them.
fn logits(output_dir: &Path, tp: usize) -> Tensor {
    let (model, adapter) = (output_dir.join("model"), output_dir.join("adapter"));
    let base = if model.exists() { model } else { stories260k() };
    let ranks = on_ranks(tp, |comm| {
        let options =
            LoadOptions { pack: false, tp_rank: comm.rank(), tp, ..LoadOptions::default() };
        let mut model = Llama::load(&Checkpoint::open(&base).unwrap(), &options).unwrap();
        if adapter.exists() {
            model.attach(&AdapterFile::open(&adapter).unwrap()).unwrap();
        }
        model.forward_logits(&TEXT, comm).unwrap()
    });
    ranks.into_iter().next().unwrap()
}

/// Fault 13: what a run of one layout has saved is read at every other, and means the same there. A run that
/// has no step left publishes what it has read.
fn read_at_every_layout(what: &str, more: &[&str]) {
    let job = Job::new(27);
    let flags = [&STEPS[..], more].concat();
    let untrained = logits(&job.path("nothing"), 1);
    for from in WRITERS {
        let out = job.path(&from.name(what));
        on_threads(&job, from, &out, &flags);
        assert_eq!(checkpoints(&out), ["checkpoint-3"]);
        let saved = (trained(&out), logits(&out, 1));
        let moved = largest(&(&saved.1 - &untrained));
        assert!(moved > 1e-2 * largest(&untrained), "training moved logits by {moved} alone");
        let others = WRITERS.into_iter().filter(|to| (to.dp, to.tp) != (from.dp, from.tp));
        for to in others.chain([THREE]) {
            for name in ["adapter", "model"] {
                let _ = fs::remove_dir_all(out.join(name));
            }
            let end = under_mpirun(&job, to, &out, &flags);
            let names = |dims: Dims| format!("dp {} x tp {}", dims.dp, dims.tp);
            end.assert_success().assert_said("going on behind step 3").assert_said(&format!(
                "checkpoint-3 was written at {} and is read at {}",
                names(from),
                names(to)
            ));
            // Nothing is computed between reading and publishing.
            for ((name, got), (_, want)) in trained(&out).iter().zip(&saved.0) {
                assert!(got == want, "{name}, {} at {}", names(from), names(to));
            }
            let off = largest(&(logits(&out, to.tp) - &saved.1));
            assert!(off < 1e-4 * largest(&saved.1), "off by {off}, {}", names(to));
        }
    }
}

#[test]
fn adapters_of_one_layout_give_the_same_logits_at_every_other() {
    read_at_every_layout("adapters", &[]);
}

#[test]
fn weights_of_one_layout_give_the_same_logits_at_every_other() {
    read_at_every_layout("weights", &WEIGHTS);
}
