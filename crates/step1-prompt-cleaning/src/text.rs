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
    let mut normalized = String::with_capacity(text.len());
    for byte in text.bytes() {
        if !is_space(char::from(byte)) {
            normalized.push(char::from(byte.to_ascii_lowercase()));
        } else if !normalized.is_empty() && !normalized.ends_with(' ') {
            normalized.push(' ');
        }
    }
    normalized.truncate(normalized.trim_end().len());
    normalized
}
