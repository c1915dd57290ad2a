//! Unpacking wheels.

use std::{
    fs,
    fs::{File, FileTimes},
    io,
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use zip::ZipArchive;

/// Unpacks the files that `place` names a path for, and returns how many there were.
///
/// All get one old time stamp: an unpacked header is not newer than what was built with its equal
/// in another cache, and cargo builds nothing anew for it.
pub(crate) fn unpack(
    archive: &Path,
    into: &Path,
    place: impl Fn(&str) -> Option<PathBuf>,
) -> Result<usize> {
    let unread = || format!("cannot unpack {}", archive.display());
    let mut zip =
        ZipArchive::new(File::open(archive).with_context(unread)?).with_context(unread)?;
    let times = FileTimes::new().set_modified(UNIX_EPOCH + Duration::from_hours(24 * 365 * 40));
    let mut count = 0;
    for index in 0..zip.len() {
        let mut member = zip.by_index(index).with_context(unread)?;
        if !member.is_file() {
            continue;
        }
        ensure!(
            member.enclosed_name().is_some(),
            "{}: unsafe name {}",
            archive.display(),
            member.name()
        );
        let Some(place) = place(member.name()) else { continue };
        let path = into.join(place);
        let unwritten = || format!("cannot write {}", path.display());
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(unwritten)?;
        }
        let mut file = File::create(&path).with_context(unwritten)?;
        io::copy(&mut member, &mut file).with_context(|| {
            format!("cannot unpack {} to {}", archive.display(), path.display())
        })?;
        file.set_times(times).with_context(unwritten)?;
        count += 1;
    }
    Ok(count)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use zip::{ZipWriter, write::SimpleFileOptions};

    use super::*;

    /// A zip file with the given members.
    pub(crate) fn zip(members: &[(&str, &str)]) -> Vec<u8> {
        let mut writer = ZipWriter::new(io::Cursor::new(Vec::new()));
        for (name, text) in members {
            writer.start_file(*name, SimpleFileOptions::default()).unwrap();
            writer.write_all(text.as_bytes()).unwrap();
        }
        writer.finish().unwrap().into_inner()
    }

    #[test]
    fn chosen_members_go_to_their_places() {
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("a.whl");
        fs::write(&archive, zip(&[("torch/include/a.h", "h"), ("torch/x.py", "py")])).unwrap();
        let place = |name: &str| name.strip_prefix("torch/include/").map(PathBuf::from);
        assert_eq!(unpack(&archive, &folder.path().join("out"), place).unwrap(), 1);
        let path = folder.path().join("out/a.h");
        assert_eq!(fs::read_to_string(&path).unwrap(), "h");
        let age = fs::metadata(path).unwrap().modified().unwrap().elapsed().unwrap();
        assert!(age > Duration::from_hours(24 * 365));
    }

    #[test]
    fn members_that_leave_the_folder_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("a.whl");
        fs::write(&archive, zip(&[("../evil", "x")])).unwrap();
        let error = unpack(&archive, &folder.path().join("out"), |name| Some(name.into()));
        assert!(error.unwrap_err().to_string().contains("../evil"));
        assert!(!folder.path().join("evil").exists());
    }

    #[test]
    fn a_damaged_archive_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("a.whl");
        fs::write(&archive, "no zip").unwrap();
        let error = unpack(&archive, folder.path(), |name| Some(name.into())).unwrap_err();
        assert!(error.to_string().contains("a.whl"), "{error}");
    }
}
