//! How likely given texts are.

// Shapes: T = tokens of all rows, N = target tokens, C = hidden_size, W = this rank's rows of the
// vocabulary.

use tch::{Kind, Tensor};

use super::{
    Engine,
    engine::PREFILL_TOKENS,
    prefill::{Prompt, read_prompts},
};
use crate::{Error, Result};

/// Positions whose logits are computed at once: bounds their memory.
const HEAD_ROWS: usize = 256;

/// A text whose likelihood is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ScoreRequest {
    /// What comes before it; not empty.
    pub prompt: Vec<u32>,
    /// The text itself, as [`Tokenizer::encode_continuation`](dromedary_tokenizer::Tokenizer) splits
    /// it.
    pub target: Vec<u32>,
}

/// A request on its way: what is computed of it.
struct ScoreRow<'r> {
    number: usize,
    request: &'r ScoreRequest,
    /// Tokens of the pinned prefix that it sees.
    prefix: usize,
    /// Prompt behind the prefix, and target without its last token.
    tokens: Vec<u32>,
}

impl Engine<'_> {
    /// The sum of the log-probabilities of each target's tokens behind its prompt, at temperature 1
    /// and without bias or penalties, as Dromedary's `Llama.score` gives it. 0 for an empty target.
    ///
    /// Rows are computed together as far as the engine's settings allow, behind the pinned prefix
    /// where they begin with it. Every rank of the group must call this with the same requests; all
    /// get the same.
    ///
    /// # Errors
    /// [`Error::CannotScore`] for a row without a prompt or too long for a slot, before anything is
    /// computed; logits that are not finite, a token that is not in the vocabulary, no memory, a
    /// failed exchange between ranks.
    pub fn score(&mut self, requests: &[ScoreRequest]) -> Result<Vec<f64>> {
        let rows: Vec<ScoreRow<'_>> = requests
            .iter()
            .enumerate()
            .filter(|(_, request)| !request.target.is_empty())
            .map(|(number, request)| self.score_row(number, request))
            .collect::<Result<_>>()?;
        let result = tch::no_grad(|| self.score_all(&rows, requests.len()));
        self.forget_slots_unless(result)
    }

    fn score_all(&mut self, mut rows: &[ScoreRow<'_>], requests: usize) -> Result<Vec<f64>> {
        let mut scores = vec![0.0; requests];
        while !rows.is_empty() {
            let (now, later) = rows.split_at(self.rows_at_once(rows));
            for (row, score) in now.iter().zip(self.score_rows(now)?) {
                scores[row.number] = score;
            }
            rows = later;
        }
        Ok(scores)
    }

    fn score_row<'r>(&self, number: usize, request: &'r ScoreRequest) -> Result<ScoreRow<'r>> {
        let ScoreRequest { prompt, target } = request;
        let refused = |reason: String| Error::CannotScore { row: number, reason };
        if prompt.is_empty() {
            return Err(refused("the prompt has no tokens".into()));
        }
        // The prompt's last token gives the logits of the target's first.
        let prefix = self.prefix.as_ref().map_or(0, |prefix| prefix.shared_with(prompt));
        let tokens = [&prompt[prefix..], &target[..target.len() - 1]].concat();
        let context = self.model.config().max_position_embeddings as usize;
        let room = self.room(prefix);
        if tokens.len() > room {
            return Err(refused(format!(
                "prompt and target have {} tokens behind {prefix} of the shared prefix, and a row has \
                 room for {} with the target's last (max_seq_len {}, context {context})",
                tokens.len() + 1,
                room + 1,
                self.config.max_seq_len
            )));
        }
        Ok(ScoreRow { number, request, prefix, tokens })
    }

    /// How many of the next rows are computed together: at least one.
    fn rows_at_once(&self, rows: &[ScoreRow<'_>]) -> usize {
        if self.config.deterministic {
            return 1;
        }
        let (mut count, mut tokens, mut longest) = (0, 0, 0);
        for row in rows.iter().take(self.config.max_batch_size) {
            tokens += row.tokens.len();
            longest = longest.max(row.tokens.len());
            let fits = (count + 1) * longest <= self.config.max_kv_tokens();
            if count > 0 && (tokens > PREFILL_TOKENS || !fits) {
                break;
            }
            count += 1;
        }
        count
    }

    fn score_rows(&mut self, rows: &[ScoreRow<'_>]) -> Result<Vec<f64>> {
        let longest = rows.iter().map(|row| row.tokens.len()).max().unwrap_or(0);
        let (slots, capacity) = self.cache.size();
        if slots < rows.len() as i64 || capacity < longest as i64 {
            self.cache.resize(rows.len() as i64, longest as i64, &[])?;
        }
        let prompts: Vec<Prompt<'_>> = rows
            .iter()
            .enumerate()
            .map(|(slot, row)| Prompt { slot, prefix: row.prefix, copied: 0, tokens: &row.tokens })
            .collect();
        let x =
            read_prompts(self.model, self.comm, &mut self.cache, self.prefix.as_ref(), &prompts)?; // (T, C)
        let (mut at, mut targets, mut row_of) = (Vec::new(), Vec::new(), Vec::new());
        let mut end = 0;
        for (index, row) in rows.iter().enumerate() {
            end += row.tokens.len() as i64;
            let target = &row.request.target;
            at.extend(end - target.len() as i64..end);
            targets.extend_from_slice(target);
            row_of.extend(std::iter::repeat_n(index, target.len()));
        }
        let mut scores = vec![0.0; rows.len()];
        for ((at, targets), row_of) in
            at.chunks(HEAD_ROWS).zip(targets.chunks(HEAD_ROWS)).zip(row_of.chunks(HEAD_ROWS))
        {
            let at = Tensor::from_slice(at).to_device(self.model.device());
            let logits = self.model.head(&self.model.final_norm(&x.f_index_select(0, &at)?))?; // (N, W)
            for (&row, log_probability) in
                row_of.iter().zip(self.log_probabilities(&logits, targets)?)
            {
                if !log_probability.is_finite() {
                    let id = format!("score {}", rows[row].number);
                    return Err(Error::NonFiniteLogits { id, position: 0 });
                }
                scores[row] += log_probability;
            }
        }
        Ok(scores)
    }

    /// The log-probability of each target, from this rank's logits, `(N, W)`.
    fn log_probabilities(&self, logits: &Tensor, targets: &[u32]) -> Result<Vec<f64>> {
        let vocabulary = &self.model.rank_plan().vocab;
        if let Some(&id) =
            targets.iter().find(|&&id| i64::from(id) >= self.model.config().vocab_size)
        {
            return Err(Error::TokenId { id, vocab_size: self.model.config().vocab_size });
        }
        let max = logits.amax([-1], true); // (N, 1)
        let sum = (logits - &max).f_exp_()?.sum_dim_intlist(-1, true, Kind::Float); // (N, 1)
        let width = vocabulary.end - vocabulary.start;
        let columns: Vec<i64> = targets
            .iter()
            .map(|&id| (i64::from(id) - vocabulary.start).clamp(0, width - 1))
            .collect();
        let columns = Tensor::from_slice(&columns).to_device(logits.device()).unsqueeze(-1);
        let target = logits.f_gather(1, &columns, false)?; // (N, 1)
        let mut all = Tensor::f_cat(&[max, sum, target], 1)?; // (N, 3)
        if self.comm.world_size() > 1 {
            all = self.comm.all_gather(&all)?; // (tp x N, 3)
        }
        let all = Vec::<f32>::try_from(all.reshape(-1))?;
        let of = |rank: usize, index: usize| &all[(rank * targets.len() + index) * 3..][..3];
        let ranks = 0..self.comm.world_size();
        Ok(targets
            .iter()
            .enumerate()
            .map(|(index, &id)| {
                let maxima = ranks.clone().map(|rank| f64::from(of(rank, index)[0]));
                let max = if maxima.clone().any(f64::is_nan) {
                    f64::NAN
                } else {
                    maxima.fold(f64::NEG_INFINITY, f64::max)
                };
                let sum: f64 = ranks
                    .clone()
                    .map(|rank| {
                        f64::from(of(rank, index)[1]) * (f64::from(of(rank, index)[0]) - max).exp()
                    })
                    .sum();
                let owner = ranks
                    .clone()
                    .find(|&rank| self.model.plan().rank(rank).vocab.contains(&i64::from(id)));
                f64::from(of(owner.unwrap_or(0), index)[2]) - max - sum.ln()
            })
            .collect())
    }
}
