use crate::Rules;
use crate::text::normalize;

/// 128 bits that stand for a prompt: equal for equal prompts, different for others but for a
/// chance of less than 2^-80 in ten million rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint([u8; 16]);

impl Fingerprint {
    /// The fingerprint of a prompt: of its bytes under [`Rules::Dromedary`], else of its
    /// [`normalize`]d text.
    pub fn of(rules: Rules, text: &str) -> Fingerprint {
        let hash = match rules {
            Rules::Dromedary => blake3::hash(text.as_bytes()),
            Rules::Corrected => blake3::hash(normalize(text).as_bytes()),
        };
        let mut first_half = [0; 16];
        first_half.copy_from_slice(&hash.as_bytes()[..16]);
        Fingerprint(first_half)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

/// A random order of prompts that is a function of the seed and the prompts themselves: neither the
/// order of the input nor the number of threads changes it.
///
/// Dromedary shuffles with an unseeded generator.
#[derive(Clone, Debug)]
pub struct KeyedOrder {
    key: [u8; 32],
}

impl KeyedOrder {
    /// The order of this seed.
    pub fn new(seed: u64) -> KeyedOrder {
        let key =
            blake3::derive_key("dromedary prompt-cleaning 2024 keyed order", &seed.to_le_bytes());
        KeyedOrder { key }
    }

    /// The place in a sample: a cap of n keeps the n smallest of a stratum.
    pub fn sample_key(&self, prompt: &Fingerprint) -> u128 {
        self.keys(prompt).0
    }

    /// The place in the output, independent of the place in the sample.
    pub fn output_key(&self, prompt: &Fingerprint) -> u128 {
        self.keys(prompt).1
    }

    /// The place of the row of this id in a keyed sample: a hash of it and the seed, so that it is
    /// the same whatever the other rows are.
    pub fn choice_key(&self, id: &str) -> u64 {
        let hash = blake3::keyed_hash(&self.key, id.as_bytes());
        hash.as_bytes()[..8].iter().fold(0, |key, &byte| key << 8 | u64::from(byte))
    }

    /// Its places in the sample and in the output.
    pub(crate) fn keys(&self, prompt: &Fingerprint) -> (u128, u128) {
        let hash = blake3::keyed_hash(&self.key, prompt.as_bytes());
        let half = |range: std::ops::Range<usize>| {
            hash.as_bytes()[range].iter().fold(0, |key, &byte| key << 8 | u128::from(byte))
        };
        (half(0..16), half(16..32))
    }
}
