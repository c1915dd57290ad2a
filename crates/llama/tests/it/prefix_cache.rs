//! Prefixes that are kept on the disk.

use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime},
};

use dromedary_llama::{
    LoadOptions,
    generation::{EngineConfig, PrefixCache, Sampling},
};
use dromedary_parallel::{Communicator, SingleProcess};
use tch::Kind;

use crate::support::{Loaded, on_ranks, request, run, stories};

fn cache(dir: &Path) -> PrefixCache {
    PrefixCache { dir: dir.to_owned(), model: "stories260k".into() }
}

/// Whether the prefix was taken from the folder, and the tokens of a row behind it.
fn generate(comm: &dyn Communicator, tokens: &[u32], cache: &PrefixCache) -> (bool, Vec<u32>) {
    generate_with(comm, LoadOptions::default(), tokens, cache)
}

fn generate_with(
    comm: &dyn Communicator,
    options: LoadOptions,
    tokens: &[u32],
    cache: &PrefixCache,
) -> (bool, Vec<u32>) {
    let loaded = Loaded::with(&stories(), comm, options);
    // The last bits decide at such a temperature.
    let sampling = Sampling { top_k: 300, ..Sampling::nucleus(1e5, 1.0) };
    let config = EngineConfig { sampling, max_gen_len: 30, ..EngineConfig::default() };
    let mut engine = loaded.engine(comm, config);
    let taken = engine.pin_prefix_cached(tokens, cache).unwrap();
    assert_eq!(engine.prefix().unwrap().len(), tokens.len());
    let row = request("row", [tokens, &[403, 407]].concat());
    (taken, run(&mut engine, vec![row]).finished.remove(0).tokens)
}

fn prefix() -> Vec<u32> {
    (0..50).map(|at| 260 + at * 37 % 200).collect()
}

fn entries(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

#[test]
fn a_kept_prefix_gives_the_same_rows() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(&dir.path().join("prefixes"));
    let (taken, want) = generate(&SingleProcess, &prefix(), &cache);
    assert!(!taken);
    assert_eq!(generate(&SingleProcess, &prefix(), &cache), (true, want.clone()));
    // What else it depends on is another entry, not a wrong one.
    let other_model = PrefixCache { model: "other".into(), ..cache.clone() };
    assert_eq!(generate(&SingleProcess, &prefix(), &other_model), (false, want));
    assert!(!generate(&SingleProcess, &prefix()[1..], &cache).0);
    assert_eq!(entries(&cache.dir).len(), 3);
}

/// Weights in bf16 and in f16 are rounded differently, though a CPU computes in f32 with both.
#[test]
fn each_way_to_load_a_model_has_an_entry() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path());
    let of = |pack, kind| LoadOptions { pack, kind, ..LoadOptions::default() };
    let ways = [
        of(true, Kind::Float),
        of(false, Kind::Float),
        of(true, Kind::BFloat16),
        of(true, Kind::Half),
    ];
    let rows = |taken: bool| {
        ways.map(|options| {
            let row = generate_with(&SingleProcess, options, &prefix(), &cache);
            assert_eq!(row.0, taken, "{options:?}");
            row.1
        })
    };
    assert_eq!(rows(false), rows(true));
    assert_eq!(entries(dir.path()).len(), ways.len());
}

/// A process that was killed while it kept a prefix.
#[test]
fn what_is_left_of_killed_processes_goes_with_the_next_entry() {
    let dir = tempfile::tempdir().unwrap();
    let [old, new] = ["old", "new"].map(|name| dir.path().join(format!(".prefix-{name}.x.tmp")));
    for path in [&old, &new] {
        fs::create_dir(path).unwrap();
    }
    let week_ago = SystemTime::now() - Duration::from_secs(7 * 24 * 3600);
    fs::File::open(&old).unwrap().set_modified(week_ago).unwrap();
    assert!(!generate(&SingleProcess, &prefix(), &cache(dir.path())).0);
    assert!(!old.exists() && new.exists());
    assert_eq!(entries(dir.path()).len(), 2);
}

#[test]
fn damaged_and_foreign_entries_are_run_again_and_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path());
    let (_, want) = generate(&SingleProcess, &prefix(), &cache);
    let entry = entries(dir.path()).remove(0);
    let tensors = entry.join("prefix.safetensors");
    let bytes = fs::read(&tensors).unwrap();
    let mut flipped = bytes.clone();
    let last = flipped.len() - 5;
    flipped[last] ^= 0x10;
    for damaged in [&bytes[..bytes.len() / 2], &flipped, &[]] {
        fs::write(&tensors, damaged).unwrap();
        assert_eq!(generate(&SingleProcess, &prefix(), &cache), (false, want.clone()));
        assert_eq!(generate(&SingleProcess, &prefix(), &cache), (true, want.clone()));
    }
    for file in ["prefix.safetensors", "prefix.json", "manifest.json"] {
        fs::remove_file(entry.join(file)).unwrap();
        assert_eq!(generate(&SingleProcess, &prefix(), &cache), (false, want.clone()), "{file}");
    }
    // A sound entry of another prefix under this one's name.
    let foreign = generate(&SingleProcess, &prefix()[1..], &cache);
    let other = entries(dir.path()).into_iter().find(|path| *path != entry).unwrap();
    fs::remove_dir_all(&entry).unwrap();
    fs::rename(other, &entry).unwrap();
    assert_eq!(generate(&SingleProcess, &prefix(), &cache), (false, want));
    assert!(!foreign.0);
}

#[test]
fn a_folder_that_cannot_be_written_to_is_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(!generate(&SingleProcess, &prefix(), &cache(&file)).0);
}

#[test]
fn ranks_take_a_prefix_together_or_run_it_together() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path());
    let all = || on_ranks(2, |comm| generate(comm, &prefix(), &cache));
    let first = all();
    assert!(!first[0].0 && !first[1].0 && first[0].1 == first[1].1);
    let entries = entries(dir.path());
    assert_eq!(entries.len(), 2);
    let taken = (true, first[0].1.clone());
    assert_eq!(all(), [taken.clone(), taken.clone()]);
    fs::remove_dir_all(&entries[1]).unwrap();
    assert_eq!(all(), first);
    assert_eq!(all(), [taken.clone(), taken]);
}
