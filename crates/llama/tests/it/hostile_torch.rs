//! Fault 17: files of PyTorch's formats made to run code, to exhaust or to deceive their reader.

use std::{
    fs::{self, File},
    io::{Cursor, Write},
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use dromedary_llama::convert;
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

use crate::{convert::options, hostile::peak_rss_kb, support};

const DIR: &str = "HOSTILE_TORCH_CASES_DIR";
/// Against hanging: the slowest needs half a second.
const LIMIT: Duration = Duration::from_secs(10);
const MAX_RSS_KB: u64 = 300 * 1024;
/// Where every command of the hostile pickles would leave its mark.
const MARKER: &str = "marker";

/// An archive of stored members.
fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in members {
        zip.start_file(*name, options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// A file as torch.save writes it, with this pickle and one storage of 16 bytes.
fn with_pickle(pickle: &[u8]) -> Vec<u8> {
    archive(&[("archive/data.pkl", pickle), ("archive/data/0", &[0; 16])])
}

fn text(value: &str) -> Vec<u8> {
    [&b"X"[..], &(value.len() as u32).to_le_bytes(), value.as_bytes()].concat()
}

fn integer(value: i64) -> Vec<u8> {
    [&[0x8a, 8][..], &value.to_le_bytes()].concat()
}

/// `{name: tensor}` with a storage of `len` f32 under `key`; offset, shape and strides as given.
fn tensor(key: &str, len: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let tuple = |sizes: &[i64]| {
        let items: Vec<u8> = sizes.iter().flat_map(|size| integer(*size)).collect();
        [&b"("[..], &items, b"t"].concat()
    };
    [
        &b"\x80\x02}"[..],
        &text("tok_embeddings.weight"),
        b"ctorch._utils\n_rebuild_tensor_v2\n((",
        &text("storage"),
        b"ctorch\nFloatStorage\n",
        &text(key),
        &text("cpu"),
        &integer(len),
        b"tQ",
        &integer(offset),
        &tuple(shape),
        &tuple(strides),
        b"\x89ccollections\nOrderedDict\n)RtRs.",
    ]
    .concat()
}

/// A call of something with one text.
fn call(module: &str, name: &str, argument: &str) -> Vec<u8> {
    [format!("\x63{module}\n{name}\n").as_bytes(), &text(argument), b"\x85R"].concat()
}

/// A pickle that makes this of its only tensor.
fn program(body: &[u8]) -> Vec<u8> {
    [&b"\x80\x02}"[..], &text("w"), body, b"s."].concat()
}

/// The stream format around a pickle of tensors.
fn stream(tensors: &[u8], rest: &[u8]) -> Vec<u8> {
    [
        &b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}"[..],
        &text("little_endian"),
        b"\x88s.",
        tensors,
        rest,
    ]
    .concat()
}

/// `damage` applied to a good file.
fn damaged(damage: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = with_pickle(&tensor("0", 4, 0, &[2, 2], &[2, 1]));
    damage(&mut bytes);
    bytes
}

fn position(bytes: &[u8], part: &[u8]) -> usize {
    bytes.windows(part.len()).position(|window| window == part).unwrap()
}

fn cases(marker: &str) -> Vec<(&'static str, Vec<u8>)> {
    let touch = format!("touch {marker}");
    let write = format!("open({marker:?}, 'w')");
    let bomb = |opcode: u8| with_pickle(&[&b"\x80\x02"[..], &vec![opcode; 15 << 20]].concat());
    let doubling: Vec<u8> =
        [&b"\x80\x02]q\x00"[..], &b"(h\x00h\x00h\x00h\x00e".repeat(1 << 18), b"."].concat();
    vec![
        ("os_system", with_pickle(&program(&call("os", "system", &touch)))),
        ("posix_system", with_pickle(&program(&call("posix", "system", &touch)))),
        ("eval", with_pickle(&program(&call("builtins", "eval", &write)))),
        ("exec_python2", with_pickle(&program(&call("__builtin__", "execfile", &touch)))),
        ("subprocess", with_pickle(&program(&call("subprocess", "Popen", &touch)))),
        ("torch_load", with_pickle(&program(&call("torch", "load", marker)))),
        ("dotted_name", with_pickle(&program(&call("torch._utils", "os.system", &touch)))),
        ("stack_global", {
            let body = [&text("os")[..], &text("system"), b"\x93", &text(&touch), b"\x85R"];
            with_pickle(&[&b"\x80\x04}"[..], &text("w"), &body.concat(), b"s."].concat())
        }),
        ("inst", with_pickle(&program(&[&b"("[..], &text(&touch), b"ios\nsystem\n"].concat()))),
        ("obj", with_pickle(&program(&[&b"(cos\nsystem\n"[..], &text(&touch), b"o"].concat()))),
        ("newobj", with_pickle(&program(b"ccollections\nOrderedDict\n)\x81"))),
        ("ext", with_pickle(&program(b"\x82\x01"))),
        ("build_setstate", with_pickle(&program(b"K\x01}b"))),
        ("stream_os_system", stream(&program(&call("os", "system", &touch)), b"")),
        ("stream_before_tensors", call("os", "system", &touch)),
        ("reduce_bomb", with_pickle(&program(&b"ccollections\nOrderedDict\n)R".repeat(400_000)))),
        ("binbytes8_4gb", with_pickle(&program(b"\x8e\x00\x00\x00\x00\x01\x00\x00\x00xx"))),
        ("binunicode8_4gb", with_pickle(&program(b"\x8d\x00\x00\x00\x00\x01\x00\x00\x00xx"))),
        ("frame_2_63", with_pickle(b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.")),
        ("memo_loop", with_pickle(b"\x80\x02]q\x00h\x00a.")),
        ("memo_dict_loop", with_pickle(b"\x80\x02}q\x00h\x00h\x00s.")),
        ("memo_doubling", with_pickle(&doubling)),
        ("memo_far", with_pickle(b"\x80\x02}r\xff\xff\xff\xff.")),
        ("bomb_of_dicts", bomb(b'}')),
        ("bomb_of_lists", bomb(b']')),
        ("bomb_of_tuples", bomb(b')')),
        ("bomb_of_marks", bomb(b'(')),
        ("deep_tuples", with_pickle(&[&b"\x80\x02N"[..], &vec![0x85; 15 << 20], b"."].concat())),
        ("endless", with_pickle(b"\x80\x02")),
        ("not_a_dict", with_pickle(b"\x80\x02N.")),
        ("not_tensors", with_pickle(&program(b"K\x01"))),
        ("compressed_bomb", {
            // A member that claims to be deflated; what it would become does not matter.
            let mut bytes = archive(&[("archive/data.pkl", &[0; 64])]);
            let central = position(&bytes, b"PK\x01\x02");
            (bytes[8], bytes[central + 10]) = (8, 8);
            bytes
        }),
        ("member_above", archive(&[("archive/data.pkl", b"\x80\x02}."), ("../escape", b"x")])),
        ("member_absolute", archive(&[("archive/data.pkl", b"\x80\x02}."), ("/etc/x", b"x")])),
        ("member_backslash", archive(&[("archive/data.pkl", b"\x80\x02}."), ("..\\x", b"x")])),
        ("two_pickles", archive(&[("a/data.pkl", b"\x80\x02}."), ("b/data.pkl", b"\x80\x02}.")])),
        ("no_pickle", archive(&[("archive/data/0", &[0; 16])])),
        ("pickle_too_long", archive(&[("archive/data.pkl", &vec![b'N'; (16 << 20) + 1])])),
        ("big_endian", {
            let pickle = tensor("0", 4, 0, &[2, 2], &[2, 1]);
            let data = ("archive/data/0", &[0_u8; 16][..]);
            archive(&[("archive/data.pkl", &pickle), ("archive/byteorder", b"big"), data])
        }),
        ("storage_missing", with_pickle(&tensor("7", 4, 0, &[2, 2], &[2, 1]))),
        ("storage_path", with_pickle(&tensor("../data.pkl", 4, 0, &[2, 2], &[2, 1]))),
        ("storage_longer", with_pickle(&tensor("0", 400, 0, &[2, 2], &[2, 1]))),
        ("storage_2_62", with_pickle(&tensor("0", 1 << 62, 0, &[2, 2], &[2, 1]))),
        ("storage_negative", with_pickle(&tensor("0", -4, 0, &[2, 2], &[2, 1]))),
        ("offset_beyond", with_pickle(&tensor("0", 4, 1, &[2, 2], &[2, 1]))),
        ("offset_2_62", with_pickle(&tensor("0", 4, 1 << 62, &[2, 2], &[2, 1]))),
        ("shape_overflow", with_pickle(&tensor("0", 4, 0, &[1 << 40, 1 << 40], &[1, 1]))),
        ("shape_zero_overflow", with_pickle(&tensor("0", 4, 0, &[0, 1 << 62, 8], &[1, 1, 1]))),
        ("shape_negative", with_pickle(&tensor("0", 4, 0, &[-2, 2], &[2, 1]))),
        ("strides_zero", with_pickle(&tensor("0", 4, 0, &[1 << 40, 2], &[0, 1]))),
        ("strides_overflow", with_pickle(&tensor("0", 4, 0, &[3, 2], &[i64::MAX, 1]))),
        ("strides_missing", with_pickle(&tensor("0", 4, 0, &[2, 2], &[1]))),
        ("dimensions", with_pickle(&tensor("0", 4, 0, &[1; 200_000], &[1; 200_000]))),
        ("stream_storage_2_63", {
            let keys = [&b"\x80\x02]"[..], &text("0"), b"a."].concat();
            let rest = [&keys[..], &(1_u64 << 63).to_le_bytes(), &[0; 16]].concat();
            stream(&tensor("0", 4, 0, &[2, 2], &[2, 1]), &rest)
        }),
        ("stream_without_storages", stream(&tensor("0", 4, 0, &[2, 2], &[2, 1]), b"\x80\x02].")),
        ("stream_with_a_tail", {
            let keys = [&b"\x80\x02]"[..], &text("0"), b"a."].concat();
            let rest = [&keys[..], &4_u64.to_le_bytes(), &[0; 20]].concat();
            stream(&tensor("0", 4, 0, &[2, 2], &[2, 1]), &rest)
        }),
        ("cut_off", damaged(|bytes| bytes.truncate(bytes.len() - 40))),
        ("cut_in_the_middle", damaged(|bytes| bytes.truncate(100))),
        (
            "member_beyond_the_file",
            damaged(|bytes| {
                let central = position(bytes, b"PK\x01\x02");
                bytes[central + 20..central + 28]
                    .copy_from_slice(&[0xff, 0xff, 0xff, 0x7f].repeat(2));
            }),
        ),
        (
            "members_overlap",
            damaged(|bytes| {
                // The second member of the directory begins where the first does.
                let first = position(bytes, b"PK\x01\x02");
                let second = first + 4 + position(&bytes[first + 4..], b"PK\x01\x02");
                bytes[second + 42..second + 46].copy_from_slice(&[0; 4]);
            }),
        ),
        (
            "count_of_members",
            damaged(|bytes| {
                let end = position(bytes, b"PK\x05\x06");
                bytes[end + 8..end + 12].copy_from_slice(&[0xff; 4]);
            }),
        ),
        ("many_members", {
            let names: Vec<_> = (0..70_000).map(|n| format!("archive/data/{n:0200}")).collect();
            let members: Vec<_> = names.iter().map(|name| (name.as_str(), &b""[..])).collect();
            archive(&members)
        }),
        ("empty", vec![]),
        ("text", b"hello".to_vec()),
        ("zip_magic_alone", b"PK\x03\x04".to_vec()),
    ]
}

/// A folder of Meta's layout for each case.
fn write_cases(dir: &Path) -> usize {
    let marker = dir.join(MARKER);
    let all = cases(marker.to_str().unwrap());
    for (name, bytes) in &all {
        let folder = dir.join(name);
        fs::create_dir(&folder).unwrap();
        fs::copy(support::data("meta/single/params.json"), folder.join("params.json")).unwrap();
        fs::write(folder.join("consolidated.00.pth"), bytes).unwrap();
    }
    // Zeros to look through for the end of an archive, on a disk that does not store them.
    let sparse = dir.join("sparse");
    fs::create_dir(&sparse).unwrap();
    fs::copy(support::data("meta/single/params.json"), sparse.join("params.json")).unwrap();
    let mut file = File::create(sparse.join("consolidated.00.pth")).unwrap();
    file.write_all(b"PK\x03\x04").unwrap();
    file.set_len(1 << 36).unwrap();
    all.len() + 1
}

#[test]
fn hostile_files_are_refused_and_nothing_runs() {
    let dir = tempfile::tempdir().unwrap();
    let count = write_cases(dir.path());
    // In a process of its own, so that its memory is not that of other tests.
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "hostile_torch::open_all_of_a_folder"])
        .env(DIR, dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains(&format!("refused {count} files")), "{said}");
    assert!(!dir.path().join(MARKER).exists(), "a pickle ran a command");
}

#[test]
#[ignore = "a child of hostile_files_are_refused_and_nothing_runs"]
fn open_all_of_a_folder() {
    // Unset where somebody asks for all ignored tests: its parent is among them.
    let Some(dir) = std::env::var_os(DIR).map(PathBuf::from) else { return };
    let mut folders: Vec<_> = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).collect();
    folders.sort();
    for folder in &folders {
        let start = Instant::now();
        let options = options(folder, &dir.join("output"));
        let error = convert(&options, &mut |_| ControlFlow::Continue(())).err();
        let seconds = start.elapsed();
        let said = error.unwrap_or_else(|| panic!("{} was read", folder.display())).to_string();
        let path = folder.join("consolidated.00.pth").display().to_string();
        assert!(said.contains(&path), "{said}");
        assert!(said.len() < 4096, "{}: {} bytes of error", folder.display(), said.len());
        assert!(seconds < LIMIT, "{}: {seconds:?}", folder.display());
        let peak = peak_rss_kb();
        assert!(peak < MAX_RSS_KB, "{}: {peak} kB", folder.display());
        let child = format!("/proc/self/task/{}/children", std::process::id());
        assert!(fs::read_to_string(child).is_ok_and(|children| children.is_empty()));
        println!("{}: {}", folder.file_name().unwrap().display(), said.replace(&path, "F"));
    }
    assert!(!dir.join("output").exists());
    println!("refused {} files, peak {} kB", folders.len(), peak_rss_kb());
}

#[test]
fn a_good_file_of_the_same_making_gets_past_the_reader() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(support::data("meta/single/params.json"), dir.path().join("params.json")).unwrap();
    let good = with_pickle(&tensor("0", 4, 0, &[2, 2], &[2, 1]));
    fs::write(dir.path().join("consolidated.00.pth"), good).unwrap();
    let options = options(dir.path(), &dir.path().join("output"));
    // It is read, and lacks most of the model.
    let said = convert(&options, &mut |_| ControlFlow::Continue(())).unwrap_err().to_string();
    assert!(said.contains("missing") && said.contains("[2, 2]"), "{said}");
}

#[test]
fn flipped_bits_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["params.json", "consolidated.00.pth"] {
        fs::copy(support::data("meta/padded").join(name), dir.path().join(name)).unwrap();
    }
    let path = dir.path().join("consolidated.00.pth");
    let good = fs::read(&path).unwrap();
    let pickle = position(&good, b"data.pkl");
    let ends = (0..2000).chain(pickle..pickle + 600).chain(good.len() - 3000..good.len());
    for at in ends {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&path, bad).unwrap();
        let options = options(dir.path(), &dir.path().join("output"));
        // One file of three: never a whole model, whatever was flipped.
        assert!(convert(&options, &mut |_| ControlFlow::Continue(())).is_err());
    }
}
