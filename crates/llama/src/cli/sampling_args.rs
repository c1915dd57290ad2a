use clap::Args;
use dromedary_command::{Error, boolean};
use serde::{Deserialize, Serialize};

use crate::generation::{FrequencyPenalty, Sampling};

/// The flags of a [`Sampling`], for every program that generates.
#[derive(Clone, Debug, Default, PartialEq, Args, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingArgs {
    /// Logits are divided by it before a token is drawn; 0 takes the likeliest token always
    /// [default: 0.7].
    #[arg(long, value_name = "T", help_heading = "Sampling")]
    pub temperature: Option<f64>,
    /// Draw among the likeliest tokens that together hold this probability, 1 for among all
    /// [default: 0.95].
    #[arg(long, value_name = "P", help_heading = "Sampling")]
    pub top_p: Option<f64>,
    /// Draw among this many of the likeliest tokens, 0 for among all [default: 0].
    #[arg(long, value_name = "TOKENS", help_heading = "Sampling")]
    pub top_k: Option<usize>,
    /// Drop tokens that are less likely than this share of the likeliest one [default: 0].
    #[arg(long, value_name = "SHARE", help_heading = "Sampling")]
    pub min_p: Option<f64>,
    /// Add to the logit of a token, as in 2=-100 for token 2; may be given more than once.
    #[arg(long, value_name = "ID=BIAS", help_heading = "Sampling")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logit_bias: Vec<String>,
    /// Taken from a token's logit for each time that the row has it already [default: 0].
    #[arg(long, value_name = "PENALTY", allow_negative_numbers = true, help_heading = "Sampling")]
    pub unitoken_frequency_penalty: Option<f64>,
    /// The same for each time that the row has the pair that the token would complete [default: 0].
    #[arg(long, value_name = "PENALTY", allow_negative_numbers = true, help_heading = "Sampling")]
    pub bitoken_frequency_penalty: Option<f64>,
    /// The same for sequences of three tokens [default: 0].
    #[arg(long, value_name = "PENALTY", allow_negative_numbers = true, help_heading = "Sampling")]
    pub tritoken_frequency_penalty: Option<f64>,
    /// The same for sequences of four tokens [default: 0].
    #[arg(long, value_name = "PENALTY", allow_negative_numbers = true, help_heading = "Sampling")]
    pub quadtoken_frequency_penalty: Option<f64>,
    /// Frequency penalties only for tokens that begin a word [default: true].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean,
        help_heading = "Sampling")]
    pub frequency_penalty_starts_only: Option<bool>,
    /// Tokens up to this id go free where frequency penalties are for beginnings of words only
    /// [default: 1024].
    #[arg(long, value_name = "ID", help_heading = "Sampling")]
    pub frequency_penalty_min_range: Option<u32>,
    /// Taken from the logit of every token that the row has already [default: 0].
    #[arg(long, value_name = "PENALTY", allow_negative_numbers = true, help_heading = "Sampling")]
    pub presence_penalty: Option<f64>,
    /// The logit of every token that the row has already is divided by this where it is above 0,
    /// multiplied where it is below; the prompt does not count [default: 1].
    #[arg(long, value_name = "FACTOR", help_heading = "Sampling")]
    pub repetition_penalty: Option<f64>,
}

impl SamplingArgs {
    /// The same with every default filled in, checked as far as that needs no model.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the flag that is out of range.
    pub fn resolved(self) -> Result<Self, Error> {
        let sampling = self.sampling()?;
        // Ids are checked by the engine, which knows the vocabulary.
        sampling.validate(i64::MAX).map_err(|error| match error {
            crate::Error::Setting { name, expected, got } => {
                let flag = name.replace('_', "-");
                Error::usage(format!("--{flag} {got} must be {expected}"))
            }
            error => Error::usage(error.to_string()),
        })?;
        let frequency = sampling.frequency_penalty;
        Ok(Self {
            temperature: Some(sampling.temperature),
            top_p: Some(sampling.top_p),
            top_k: Some(sampling.top_k),
            min_p: Some(sampling.min_p),
            logit_bias: self.logit_bias,
            unitoken_frequency_penalty: Some(frequency.unitoken),
            bitoken_frequency_penalty: Some(frequency.bitoken),
            tritoken_frequency_penalty: Some(frequency.tritoken),
            quadtoken_frequency_penalty: Some(frequency.quadtoken),
            frequency_penalty_starts_only: Some(frequency.starts_only),
            frequency_penalty_min_range: Some(frequency.min_range),
            presence_penalty: Some(sampling.presence_penalty),
            repetition_penalty: Some(sampling.repetition_penalty),
        })
    }

    /// What an engine takes.
    ///
    /// # Errors
    /// [`Error::Usage`] for a `--logit-bias` that is not `ID=BIAS`, or for two of one token.
    pub fn sampling(&self) -> Result<Sampling, Error> {
        let none = FrequencyPenalty::default();
        let mut sampling = Sampling {
            temperature: self.temperature.unwrap_or(0.7),
            top_p: self.top_p.unwrap_or(0.95),
            top_k: self.top_k.unwrap_or(0),
            min_p: self.min_p.unwrap_or(0.0),
            frequency_penalty: FrequencyPenalty {
                unitoken: self.unitoken_frequency_penalty.unwrap_or(0.0),
                bitoken: self.bitoken_frequency_penalty.unwrap_or(0.0),
                tritoken: self.tritoken_frequency_penalty.unwrap_or(0.0),
                quadtoken: self.quadtoken_frequency_penalty.unwrap_or(0.0),
                starts_only: self.frequency_penalty_starts_only.unwrap_or(none.starts_only),
                min_range: self.frequency_penalty_min_range.unwrap_or(none.min_range),
            },
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            ..Sampling::default()
        };
        for bias in &self.logit_bias {
            let wrong = |why: &str| Error::usage(format!("--logit-bias {bias}: {why}"));
            let (id, value) = bias
                .split_once('=')
                .and_then(|(id, value)| Some((id.parse().ok()?, value.parse().ok()?)))
                .ok_or_else(|| wrong("give ID=BIAS, as in 2=-100"))?;
            if sampling.logit_bias.insert(id, value).is_some() {
                return Err(wrong("this token has a bias already"));
            }
        }
        Ok(sampling)
    }
}

/// Texts of `--stop` as rows end with them: `\n` is a newline, as a shell's word seldom holds one. An
/// empty text ends nothing; it is there so that defaults can be switched off.
pub fn stop_strings(given: &[String]) -> Vec<String> {
    given.iter().map(|text| text.replace("\\n", "\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newline_can_be_typed() {
        let given = ["\\n\\nUser:", "a\nb", ""].map(str::to_owned);
        assert_eq!(stop_strings(&given), ["\n\nUser:", "a\nb", ""]);
    }

    #[test]
    fn flags_become_settings() {
        let args = SamplingArgs {
            top_k: Some(40),
            logit_bias: vec!["2=-100".into(), "17=0.5".into()],
            tritoken_frequency_penalty: Some(0.25),
            frequency_penalty_starts_only: Some(false),
            ..SamplingArgs::default()
        };
        let sampling = args.sampling().unwrap();
        assert_eq!(
            sampling,
            Sampling {
                top_k: 40,
                logit_bias: [(2, -100.0), (17, 0.5)].into(),
                frequency_penalty: FrequencyPenalty {
                    tritoken: 0.25,
                    starts_only: false,
                    ..FrequencyPenalty::default()
                },
                ..Sampling::nucleus(0.7, 0.95)
            }
        );
        assert_eq!(args.resolved().unwrap().sampling().unwrap(), sampling);
    }

    #[test]
    fn flags_that_make_no_sense_are_named() {
        let message = |args: SamplingArgs| args.resolved().unwrap_err().to_string();
        let bias = |texts: &[&str]| SamplingArgs {
            logit_bias: texts.iter().map(|&text| text.to_owned()).collect(),
            ..SamplingArgs::default()
        };
        for texts in [&["2"][..], &["x=1"], &["2=x"], &["-1=2"], &["2=1", "2=2"]] {
            assert!(message(bias(texts)).contains("--logit-bias"), "{texts:?}");
        }
        let args = SamplingArgs { min_p: Some(2.0), ..SamplingArgs::default() };
        assert!(message(args).contains("--min-p 2 must be"));
        let args = SamplingArgs { temperature: Some(-1.0), ..SamplingArgs::default() };
        assert!(message(args).contains("--temperature -1 must be"));
    }
}
