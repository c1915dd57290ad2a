//! Python's meanings of white space, which the original's rules rely on.

/// Whether Python's `str.isspace` holds: Unicode white space and the four separators U+001C to
/// U+001F, which Rust's [`char::is_whitespace`] leaves out.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Python's `str.strip()`.
pub fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// Lower case, with every run of white space as one space and none at the ends: two prompts that
/// differ in nothing else are the same prompt.
pub fn normalize(text: &str) -> String {
    if text.is_ascii() {
        return normalize_ascii(text);
    }
    let mut normalized = String::with_capacity(text.len());
    for word in text.split(is_space).filter(|word| !word.is_empty()) {
        if !normalized.is_empty() {
            normalized.push(' ');
        }
        normalized.push_str(&word.to_lowercase());
    }
    normalized
}

/// The same for most texts, without a look at each character's class.
fn normalize_ascii(text: &str) -> String {
    let mut normalized = vec![0; text.len()];
    let mut len = 0;
    let mut behind_space = true;
    // No branch depends on the text: its words are too short to be guessed.
    for byte in text.bytes() {
        let is_space = SPACES[usize::from(byte)];
        normalized[len] = if is_space { b' ' } else { byte.to_ascii_lowercase() };
        len += usize::from(!(is_space && behind_space));
        behind_space = is_space;
    }
    normalized.truncate(if behind_space { len.saturating_sub(1) } else { len });
    String::from_utf8(normalized).expect("ASCII is UTF-8")
}

/// The bytes for which [`is_space`] holds.
const SPACES: [bool; 256] = {
    let mut spaces = [false; 256];
    let mut byte = 0;
    while byte < 128 {
        spaces[byte] = matches!(byte, 0x09..=0x0d | 0x1c..=0x20);
        byte += 1;
    }
    spaces
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ascii_is_normalized_as_any_text() {
        for byte in 0..128_u8 {
            let c = char::from(byte);
            assert_eq!(SPACES[usize::from(byte)], is_space(c), "{c:?}");
            for text in ["", "a", " a", "a ", "  A  b  ", "\t\n", "A\x1cB"] {
                let text = format!("{c}{text}{c}");
                let other = normalize(&format!("{text} \u{e9}"));
                let expected = other.strip_suffix('\u{e9}').unwrap().trim_end_matches(' ');
                assert_eq!(normalize(&text), expected, "{text:?}");
            }
        }
    }
}
