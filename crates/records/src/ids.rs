use std::collections::BTreeMap;

/// 128 bits: no two of a billion rows meet by chance.
const ID_HEX_DIGITS: usize = 32;

/// The id of a row: 32 hexadecimal digits that depend on its content alone.
///
/// It is the BLAKE3 hash of the fields, each behind its length in bytes, and of `occurrence`: how
/// many equal rows precede this one in its file.
pub fn row_id(source: &str, instruction: &str, input: &str, occurrence: u32) -> String {
    let mut hasher = blake3::Hasher::new();
    for field in [source, instruction, input] {
        hasher.update(&(field.len() as u64).to_le_bytes());
        hasher.update(field.as_bytes());
    }
    hasher.update(&occurrence.to_le_bytes());
    let mut id = hasher.finalize().to_hex().to_string();
    id.truncate(ID_HEX_DIGITS);
    id
}

/// Hands out [`row_id`]s and counts the occurrences of equal rows.
#[derive(Clone, Debug, Default)]
pub struct RowIds {
    /// From the id of a first occurrence to how many there were.
    seen: BTreeMap<String, u32>,
}

impl RowIds {
    /// The id of the next row.
    pub fn next_id(&mut self, source: &str, instruction: &str, input: &str) -> String {
        let first = row_id(source, instruction, input, 0);
        match self.seen.get_mut(&first) {
            Some(occurrences) => {
                *occurrences += 1;
                row_id(source, instruction, input, *occurrences)
            }
            None => {
                self.seen.insert(first.clone(), 0);
                first
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ids_stay_what_they_are() {
        // Files of earlier runs are resumed by these.
        assert_eq!(row_id("dolly", "Name a camel.", "", 0), "98fe529164c41921f1e1a5e6557c339d");
    }

    #[test]
    fn equal_rows_get_ids_of_their_own() {
        let mut ids = RowIds::default();
        let three: Vec<_> = (0..3).map(|_| ids.next_id("s", "i", "")).collect();
        assert_eq!(three, [0, 1, 2].map(|occurrence| row_id("s", "i", "", occurrence)));
        assert_ne!(three[0], three[1]);
        assert_ne!(three[1], three[2]);
    }

    proptest! {
        #[test]
        fn where_a_field_ends_matters(a in ".{0,6}", b in ".{0,6}", c in ".{1,6}") {
            let id = row_id(&a, &b, &c, 0);
            prop_assert_eq!(id.len(), 32);
            prop_assert_ne!(&id, &row_id(&a, &format!("{b}{c}"), "", 0));
            prop_assert_ne!(&id, &row_id(&format!("{a}{c}"), &b, "", 0));
            prop_assert_ne!(&id, &row_id(&a, &b, &c, 1));
        }
    }
}
