//! Settings of how tokens are chosen.

use std::collections::BTreeMap;

use crate::{Error, Result};

/// A smaller temperature would make finite logits infinite in f32 when they are divided by it; at this
/// one the best token alone is left already.
const MIN_TEMPERATURE: f64 = 1e-30;

/// A logit that is changed by more would not be finite in f32, however finite the number is in f64: a
/// row's penalties add up, and a factor meets logits of some hundreds.
const MAX_CHANGE: f64 = 1e30;

/// How tokens are chosen.
///
/// In this order: the bias of each token is added; repetition, frequency and presence penalties;
/// then either the best token, or a draw with `temperature` among the `top_k` likeliest, of these
/// the nucleus `top_p`, of these those that `min_p` leaves.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 chooses the best token always, and below 1e-30 there is nothing else.
    pub temperature: f64,
    /// Nucleus: the likeliest tokens are kept while the probability of those before is at most this.
    pub top_p: f64,
    /// Number of the likeliest tokens that are kept; 0 keeps all.
    pub top_k: usize,
    /// Tokens are dropped that are less likely than this share of the likeliest one; 0 drops none.
    pub min_p: f64,
    /// What is added to the logit of a token, by its id.
    pub logit_bias: BTreeMap<u32, f64>,
    /// Penalties that grow with each repetition.
    pub frequency_penalty: FrequencyPenalty,
    /// What is taken from the logit of every token that the row has generated.
    pub presence_penalty: f64,
    /// What the logit of every token that the row has generated is divided by where it is above 0,
    /// and multiplied with where it is below; 1 changes nothing. The prompt does not count: behind a
    /// long shared prefix nearly every common word would.
    pub repetition_penalty: f64,
}

/// For each length of 1 to 4 tokens: what is taken from the logit of a token for each time that the
/// row has generated the n-gram that it would complete. As in Dromedary's
/// `llama_dromedary/generation.py`, the row's first token is no part of an n-gram.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FrequencyPenalty {
    /// For single tokens.
    pub unitoken: f64,
    /// For pairs.
    pub bitoken: f64,
    /// For triples.
    pub tritoken: f64,
    /// For quadruples.
    pub quadtoken: f64,
    /// Only for tokens that begin a word and have an id above `min_range`.
    pub starts_only: bool,
    /// Tokens up to this id, which are control and byte tokens and the commonest pieces in LLaMA's
    /// vocabulary, go free under `starts_only`.
    pub min_range: u32,
}

impl Default for FrequencyPenalty {
    /// None; if one is set, for beginnings of words with ids above 1024.
    fn default() -> Self {
        Self {
            unitoken: 0.0,
            bitoken: 0.0,
            tritoken: 0.0,
            quadtoken: 0.0,
            starts_only: true,
            min_range: 1024,
        }
    }
}

impl FrequencyPenalty {
    /// By the number of tokens that stand before the one that is punished.
    pub(crate) fn by_context(&self) -> [f64; 4] {
        [self.unitoken, self.bitoken, self.tritoken, self.quadtoken]
    }

    pub(crate) fn is_off(&self) -> bool {
        self.by_context().iter().all(|&penalty| penalty == 0.0)
    }
}

impl Default for Sampling {
    /// The best token always.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            logit_bias: BTreeMap::new(),
            frequency_penalty: FrequencyPenalty::default(),
            presence_penalty: 0.0,
            repetition_penalty: 1.0,
        }
    }
}

impl Sampling {
    /// Draws from the nucleus `top_p` with this temperature.
    pub fn nucleus(temperature: f64, top_p: f64) -> Self {
        Self { temperature, top_p, ..Self::default() }
    }

    /// Whether the best token is chosen always.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether logits are used as the model gives them.
    pub(crate) fn changes_no_logit(&self) -> bool {
        self.logit_bias.is_empty()
            && self.frequency_penalty.is_off()
            && self.presence_penalty == 0.0
            && self.repetition_penalty == 1.0
    }

    /// Checks the numbers; ids of [`Self::logit_bias`] must be below `vocab_size`.
    ///
    /// # Errors
    /// [`Error::Setting`] with the range of the number, [`Error::TokenId`].
    pub fn validate(&self, vocab_size: i64) -> Result<()> {
        let Self { temperature, top_p, min_p, presence_penalty, repetition_penalty, .. } = *self;
        let any = "a number from -1e30 to 1e30";
        let size = |got: f64| got.abs() <= MAX_CHANGE;
        let frequency = self.frequency_penalty.by_context();
        let mut checks = vec![
            (
                "temperature",
                temperature,
                temperature == 0.0 || temperature >= MIN_TEMPERATURE,
                "at least 0, and 1e-30 where it is not 0",
            ),
            ("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", min_p, (0.0..1.0).contains(&min_p), "at least 0 and below 1"),
            ("presence_penalty", presence_penalty, size(presence_penalty), any),
            (
                "repetition_penalty",
                repetition_penalty,
                (1.0 / MAX_CHANGE..=MAX_CHANGE).contains(&repetition_penalty),
                "a number from 1e-30 to 1e30",
            ),
        ];
        checks.extend(frequency.map(|penalty| ("frequency_penalty", penalty, size(penalty), any)));
        checks.extend(self.logit_bias.values().map(|&bias| ("logit_bias", bias, size(bias), any)));
        for (name, got, fits, expected) in checks {
            if !(fits && got.is_finite()) {
                return Err(Error::Setting { name, expected, got });
            }
        }
        match self.logit_bias.keys().find(|&&id| i64::from(id) >= vocab_size) {
            Some(&id) => Err(Error::TokenId { id, vocab_size }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_checked() {
        let valid = |sampling: Sampling| sampling.validate(10).is_ok();
        assert!(valid(Sampling::nucleus(0.0, 1.0)) && valid(Sampling::nucleus(2.0, 0.1)));
        for (temperature, top_p) in [
            (-1.0, 1.0),
            (f64::NAN, 1.0),
            (9e-31, 1.0),
            (f64::MIN_POSITIVE, 1.0),
            (1.0, 0.0),
            (1.0, 1.1),
        ] {
            assert!(!valid(Sampling::nucleus(temperature, top_p)));
        }
        assert!(valid(Sampling::nucleus(MIN_TEMPERATURE, 1.0)));
        let default = Sampling::default;
        let off = FrequencyPenalty::default();
        for bad in [
            Sampling { min_p: 1.0, ..default() },
            Sampling { presence_penalty: f64::INFINITY, ..default() },
            Sampling { repetition_penalty: 0.0, ..default() },
            Sampling { logit_bias: [(3, f64::NAN)].into(), ..default() },
            Sampling { logit_bias: [(10, 1.0)].into(), ..default() },
            // Finite in f64, and infinite in f32 or soon.
            Sampling { logit_bias: [(3, 1e39)].into(), ..default() },
            Sampling { logit_bias: [(3, -3e38)].into(), ..default() },
            Sampling { presence_penalty: -1e39, ..default() },
            Sampling { repetition_penalty: 1e38, ..default() },
            Sampling { repetition_penalty: 1e-38, ..default() },
            Sampling { frequency_penalty: FrequencyPenalty { unitoken: 1e39, ..off }, ..default() },
            Sampling {
                frequency_penalty: FrequencyPenalty { bitoken: f64::NAN, ..off },
                ..default()
            },
        ] {
            assert!(!valid(bad.clone()), "{bad:?}");
        }
        let banned = [(3, -1e30), (4, 1e30)].into();
        assert!(valid(Sampling { logit_bias: banned, repetition_penalty: 1e-30, ..default() }));
        assert!(default().changes_no_logit());
        let penalty = FrequencyPenalty { quadtoken: 0.5, ..off };
        assert!(!Sampling { frequency_penalty: penalty, ..default() }.changes_no_logit());
    }
}
