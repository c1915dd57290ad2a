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
    let mut normalized = String::with_capacity(text.len());
    for word in text.split(is_space).filter(|word| !word.is_empty()) {
        if !normalized.is_empty() {
            normalized.push(' ');
        }
        if word.is_ascii() {
            normalized.extend(word.bytes().map(|byte| char::from(byte.to_ascii_lowercase())));
        } else {
            normalized.push_str(&word.to_lowercase());
        }
    }
    normalized
}
