//! A page as a browser shows it, for tests of the reports.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

const BROWSERS: [&str; 4] = ["chromium", "chromium-browser", "google-chrome", "chrome"];

/// Shows the page in a frame and then, in its place, what can be seen of it: the bars and curves that
/// are drawn (lines of a few points are axes), and the text.
const FRAME: &str = r#"<!doctype html><meta charset="utf-8"><title>shown</title>
<iframe style="width: 1200px; height: 4000px" src="PAGE" onload="
    const page = this.contentDocument;
    const bars = [...page.querySelectorAll('svg rect')];
    const heights = bars.map(bar => bar.getBoundingClientRect().height);
    const drawn = heights.filter(height => height > 0).length;
    const lines = [...page.querySelectorAll('svg polyline')];
    const curves = lines.filter(line => line.points.length > 20 && line.getTotalLength() > 100);
    document.body.textContent = `drawn: ${drawn} ${curves.length}\n` + page.body.innerText;
"></iframe>
"#;

/// What a browser shows of a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// The text that can be seen; cells of a table row stand on one line, with tabs between them.
    pub text: String,
    /// The bars that are drawn in its diagrams.
    pub bars: usize,
    /// The curves that are drawn there.
    pub curves: usize,
}

/// What a browser shows of the file; `None` where there is no Chromium on the PATH.
///
/// # Errors
///
/// A browser that cannot be run or shows nothing.
pub fn shown(page: &Path) -> Result<Option<Shown>> {
    let Some(browser) = find() else {
        return Ok(None);
    };
    let page = page.canonicalize().with_context(|| page.display().to_string())?;
    let folder = tempfile::tempdir()?;
    let frame = folder.path().join("frame.html");
    fs::write(&frame, FRAME.replace("PAGE", &format!("file://{}", page.display())))?;
    let output = run(&browser, &frame, &["--allow-file-access-from-files", "--dump-dom"])?;
    let dom = String::from_utf8(output)?;
    let read = || {
        let (_, body) = dom.split_once("<body>drawn: ")?;
        let (drawn, text) = body.rsplit_once("</body>")?.0.split_once('\n')?;
        let (bars, curves) = drawn.split_once(' ')?;
        let (bars, curves) = (bars.parse().ok()?, curves.parse().ok()?);
        Some(Shown { text: unescaped(text), bars, curves })
    };
    read().map(Some).with_context(|| format!("{} shows nothing of it", browser.display()))
}

/// Takes a picture of the file as a browser shows it, for people to look at; false where there is no
/// Chromium on the PATH.
///
/// # Errors
///
/// A browser that cannot be run or makes no picture.
pub fn screenshot(page: &Path, image: &Path) -> Result<bool> {
    let Some(browser) = find() else {
        return Ok(false);
    };
    let page = page.canonicalize().with_context(|| page.display().to_string())?;
    let image_flag = format!("--screenshot={}", image.display());
    run(&browser, &page, &["--hide-scrollbars", "--window-size=1200,4600", &image_flag])?;
    ensure!(image.is_file(), "{} made no picture", browser.display());
    Ok(true)
}

/// Runs a browser without a window on a page; gives what it printed.
fn run(browser: &Path, page: &Path, flags: &[&str]) -> Result<Vec<u8>> {
    let profile = tempfile::tempdir()?;
    let output = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--timeout=30000"])
        .args(flags)
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("file://{}", page.display()))
        .stderr(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", browser.display()))?;
    ensure!(output.status.success(), "{} failed: {}", browser.display(), output.status);
    Ok(output.stdout)
}

/// The browser of the PATH.
pub(crate) fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let candidates = BROWSERS.iter().flat_map(|name| folders.iter().map(move |f| f.join(name)));
    candidates.into_iter().find(|candidate| candidate.is_file())
}

/// Undoes how a browser writes text.
fn unescaped(text: &str) -> String {
    text.replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", "\u{a0}").replace("&amp;", "&")
}
