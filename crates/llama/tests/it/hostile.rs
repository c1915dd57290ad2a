//! Fault 15: safetensors files made to crash, to exhaust or to deceive their reader.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use dromedary_llama::Checkpoint;
use serde_json::json;

use crate::tiny::{self, Tiny};

const DIR: &str = "HOSTILE_CASES_DIR";
/// Time that the process computes for one file, however much else the machine does.
const LIMIT: Duration = Duration::from_secs(1);
const MAX_RSS_KB: u64 = 200 * 1024;

/// A file with this header and so many bytes of tensors.
fn with_header(header: &[u8], data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn tensors(list: &str, data: usize) -> Vec<u8> {
    with_header(format!("{{{list}}}").as_bytes(), data)
}

/// A tensor of two f32 with its entry changed.
fn one(entry: &str) -> Vec<u8> {
    tensors(&format!("\"a\":{entry}"), 8)
}

fn cases() -> Vec<(&'static str, Vec<u8>)> {
    let good = r#""dtype":"F32","shape":[2],"data_offsets":[0,8]"#;
    let deep = |open: &str, close: &str| open.repeat(100_000) + &close.repeat(100_000);
    let many: Vec<_> = (0..300_000)
        .map(|i| format!("\"{i}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}"))
        .collect();
    let fitting: Vec<_> = many.iter().take(200_000).cloned().collect();
    vec![
        ("zero_length", vec![]),
        ("seven_bytes", vec![0; 7]),
        ("length_zero", 0_u64.to_le_bytes().to_vec()),
        ("length_2_63", [&(1_u64 << 63).to_le_bytes()[..], b"{}"].concat()),
        ("length_2_64", [&u64::MAX.to_le_bytes()[..], b"{}"].concat()),
        ("length_beyond_file", [&3_u64.to_le_bytes()[..], b"{}"].concat()),
        ("not_utf8", with_header(b"{\"\xff\xfe\":1}", 0)),
        (
            "not_utf8_in_a_value",
            with_header(b"{\"a\":{\"dtype\":\"\xc3\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8),
        ),
        ("space_before_brace", with_header(format!(" {{\"a\":{{{good}}}}}").as_bytes(), 8)),
        ("array", with_header(b"[]", 0)),
        ("text", with_header(b"hello, world", 0)),
        ("unfinished", with_header(format!("{{\"a\":{{{good}}}").as_bytes(), 8)),
        ("two_values", with_header(format!("{{\"a\":{{{good}}}}}{{}}").as_bytes(), 8)),
        ("deep_lists", one(&deep("[", "]"))),
        ("deep_maps", one(&deep("{\"a\":", "}"))),
        (
            "deep_shape",
            one(&format!(
                "{{\"dtype\":\"F32\",\"shape\":{},\"data_offsets\":[0,8]}}",
                deep("[", "]")
            )),
        ),
        (
            "deep_dtype",
            one(&format!("{{\"dtype\":{},\"shape\":[2],\"data_offsets\":[0,8]}}", deep("[", "]"))),
        ),
        ("deep_metadata", tensors(&format!("\"__metadata__\":{{\"x\":{}}}", deep("[", "]")), 0)),
        ("name_twice", tensors(&format!("\"a\":{{{good}}},\"a\":{{{good}}}"), 8)),
        ("name_twice_escaped", tensors(&format!("\"a\":{{{good}}},\"\\u0061\":{{{good}}}"), 8)),
        ("metadata_twice", tensors("\"__metadata__\":{},\"__metadata__\":{}", 0)),
        ("metadata_key_twice", tensors("\"__metadata__\":{\"k\":\"1\",\"k\":\"2\"}", 0)),
        ("metadata_not_text", tensors("\"__metadata__\":{\"k\":1}", 0)),
        ("field_twice", one(&format!("{{{good},\"shape\":[2]}}"))),
        ("field_unknown", one(&format!("{{{good},\"strides\":[1]}}"))),
        ("field_missing", one(r#"{"dtype":"F32","data_offsets":[0,8]}"#)),
        ("entry_null", one("null")),
        ("dtype_unknown", one(r#"{"dtype":"F31","shape":[2],"data_offsets":[0,8]}"#)),
        ("shape_negative", one(r#"{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}"#)),
        ("shape_fraction", one(r#"{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}"#)),
        (
            "shape_product_overflow",
            one(
                r#"{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,8]}"#,
            ),
        ),
        (
            "shape_bytes_overflow",
            one(r#"{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,8]}"#),
        ),
        (
            "shape_beyond_i64",
            one(r#"{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[0,0]}"#),
        ),
        (
            "shape_of_millions",
            one(&format!(
                "{{\"dtype\":\"F32\",\"shape\":[{}0],\"data_offsets\":[0,8]}}",
                "0,".repeat(7_000_000)
            )),
        ),
        ("wrong_size", one(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#)),
        ("offset_not_from_zero", one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#)),
        ("offsets_reversed", one(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#)),
        (
            "offsets_near_2_64",
            one(
                r#"{"dtype":"U8","shape":[8],"data_offsets":[18446744073709551607,18446744073709551615]}"#,
            ),
        ),
        (
            "end_at_2_64",
            one(
                r#"{"dtype":"U8","shape":[9223372036854775807],"data_offsets":[0,18446744073709551615]}"#,
            ),
        ),
        (
            "end_at_2_63",
            one(
                r#"{"dtype":"U8","shape":[9223372036854775807],"data_offsets":[0,9223372036854775807]}"#,
            ),
        ),
        (
            "offset_beyond_2_64",
            one(r#"{"dtype":"U8","shape":[8],"data_offsets":[0,18446744073709551616]}"#),
        ),
        (
            "gap",
            tensors(
                r#""a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[3,5]}"#,
                5,
            ),
        ),
        (
            "overlap",
            tensors(
                r#""a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}"#,
                6,
            ),
        ),
        (
            "same_bytes_twice",
            tensors(
                r#""a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}"#,
                4,
            ),
        ),
        ("trailing_bytes", tensors(&format!("\"a\":{{{good}}}"), 9)),
        ("truncated", tensors(&format!("\"a\":{{{good}}}"), 7)),
        ("three_hundred_thousand_tensors", tensors(&many.join(","), 0)),
        ("two_hundred_thousand_tensors", tensors(&fitting.join(","), 0)),
        ("name_of_a_megabyte", tensors(&format!("\"{}\":{{{good}}}", "n".repeat(1 << 20)), 8)),
        ("empty_but_valid", with_header(b"{}", 0)),
    ]
}

/// Files whose length is claimed, not stored.
fn sparse_cases() -> Vec<(&'static str, u64, u64)> {
    vec![
        ("header_beyond_100_mb", 100_000_001, 300 << 20),
        ("header_just_below_100_mb", 99_999_999, 300 << 20),
        ("header_of_16_mb_of_zeros", 16 << 20, 300 << 20),
        ("header_up_to_the_end_of_a_terabyte", (1 << 40) - 8, 1 << 40),
    ]
}

fn write_cases(dir: &Path) -> usize {
    let config = tiny::config().to_string();
    let folder = |name: &str| {
        let folder = dir.join(name);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("config.json"), &config).unwrap();
        folder.join("model.safetensors")
    };
    for (name, bytes) in cases() {
        fs::write(folder(name), bytes).unwrap();
    }
    for (name, header, size) in sparse_cases() {
        let mut file = File::create(folder(name)).unwrap();
        file.write_all(&header.to_le_bytes()).unwrap();
        file.write_all(b"{").unwrap();
        file.set_len(size).unwrap();
    }
    fs::create_dir(folder("a_folder")).unwrap();
    let made = Command::new("mkfifo").arg(folder("a_named_pipe")).status().unwrap();
    assert!(made.success());
    cases().len() + sparse_cases().len() + 2
}

#[test]
fn hostile_files_are_refused_quickly_and_in_little_memory() {
    let dir = tempfile::tempdir().unwrap();
    let count = write_cases(dir.path());
    assert!(count >= 20);
    // In a process of its own, so that its memory is not that of other tests.
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "hostile::open_all_of_a_folder"])
        .env(DIR, dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains(&format!("refused {count} files")), "{text}");
}

#[test]
#[ignore = "a child of hostile_files_are_refused_quickly_and_in_little_memory"]
fn open_all_of_a_folder() {
    // Unset where somebody asks for all ignored tests: its parent is among them.
    let Some(dir) = std::env::var_os(DIR).map(PathBuf::from) else { return };
    let mut folders: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    for folder in &folders {
        let path = folder.join("model.safetensors");
        let before = state(&path);
        let start = computed();
        let error = Checkpoint::open(folder).err();
        let took = computed() - start;
        let text = error.unwrap_or_else(|| panic!("{} was opened", folder.display())).to_string();
        assert!(text.contains(&folder.display().to_string()), "{text}");
        assert!(text.len() < 4096, "{}: {} bytes of error", folder.display(), text.len());
        assert!(took < LIMIT, "{}: {took:?}", folder.display());
        assert_eq!(state(&path), before, "{}", folder.display());
        let peak = peak_rss_kb();
        assert!(peak < MAX_RSS_KB, "{}: {peak} kB", folder.display());
    }
    println!("refused {} files, peak {} kB", folders.len(), peak_rss_kb());
}

/// What all threads of this process have computed so far, in the kernel's name and in their own.
fn computed() -> Duration {
    // Linux counts in hundredths of a second for programs, whatever it does itself.
    const TICK: Duration = Duration::from_millis(10);
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let (_, behind_name) = stat.rsplit_once(')').unwrap();
    let ticks = behind_name.split_whitespace().skip(11).take(2);
    ticks.map(|ticks| TICK * ticks.parse::<u32>().unwrap()).sum()
}

/// Size, time of the last change and, of small files, the content.
fn state(path: &Path) -> (u64, Option<std::time::SystemTime>, Option<blake3::Hash>) {
    let metadata = fs::metadata(path).unwrap();
    let small = metadata.is_file() && metadata.len() < 1 << 20;
    let hash = small.then(|| blake3::hash(&fs::read(path).unwrap()));
    (metadata.len(), metadata.modified().ok(), hash)
}

/// Memory of this process: `VmRSS` now, `VmHWM` at its highest.
pub(crate) fn memory_kb(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

pub(crate) fn peak_rss_kb() -> u64 {
    memory_kb("VmHWM")
}

#[test]
fn hostile_indices_are_refused() {
    for index in [
        "[".repeat(1_000_000),
        "{\"weight_map\":".repeat(100_000),
        "{\"weight_map\":[1]}".into(),
        "{\"weight_map\":{\"a\":{}}}".into(),
        String::new(),
        "\u{feff}{}".into(),
    ] {
        let tiny = Tiny::new(1).sharded(1);
        fs::write(tiny.index(), index).unwrap();
        let text = Checkpoint::open(tiny.path()).unwrap_err().to_string();
        assert!(text.contains("model.safetensors.index.json"), "{text}");
    }
    let tiny = Tiny::new(1).sharded(1);
    File::options().write(true).open(tiny.index()).unwrap().set_len(1 << 40).unwrap();
    assert!(Checkpoint::open(tiny.path()).unwrap_err().to_string().contains("limit"));
}

#[test]
fn a_hostile_configuration_is_refused() {
    let tiny = Tiny::new(1).single();
    fs::write(tiny.path().join("config.json"), "{\"a\":".repeat(100_000)).unwrap();
    assert!(Checkpoint::open(tiny.path()).is_err());
    fs::write(tiny.path().join("config.json"), json!({"model_type": "llama"}).to_string()).unwrap();
    assert!(Checkpoint::open(tiny.path()).unwrap_err().to_string().contains("hidden_size"));
}

#[test]
fn flipped_bits_in_a_header_never_panic() {
    let tiny = Tiny::new(2).single();
    let path = tiny.path().join("model.safetensors");
    let good = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let mut refused = 0;
    for at in 0..header {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&path, bad).unwrap();
        refused += usize::from(Checkpoint::open(tiny.path()).is_err());
    }
    // What goes unseen sits in the padding, in metadata or is white space for white space.
    assert!(refused * 10 > header * 9, "{refused} of {header} were refused");
}
