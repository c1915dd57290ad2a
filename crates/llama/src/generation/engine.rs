//! The loop: admit, prefill, decode, retire.

// Shapes: B = rows, T = tokens of all rows, C = hidden_size, W = this rank's rows of the vocabulary.

use std::{ops::ControlFlow, time::Instant};

use dromedary_parallel::Communicator;
use dromedary_tokenizer::Tokenizer;
use tch::{Kind, Tensor};

use super::{
    Event, Request, Sampling, Statistics, StopRule,
    row::Row,
    sampler::{RowKey, Sampler, check_finite},
};
use crate::{
    Error, Llama, Result,
    attention::causal_attention,
    check_tokenizer,
    kv_cache::{DecodeStep, PrefillStep, SharedPrefix, SlotCache, StepRow, Storage},
};

/// Prompts are read together until they have this many tokens: enough to keep the products wide,
/// few enough to bound the memory of a prefill.
const PREFILL_TOKENS: usize = 2048;

/// How an [`Engine`] generates.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Rows that are generated at once.
    pub max_batch_size: usize,
    /// Tokens of a row's own, prompt and output, behind the pinned prefix.
    pub max_seq_len: usize,
    /// Tokens that a row may generate.
    pub max_gen_len: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Texts that end a row.
    pub stop_strings: Vec<String>,
    /// Tokens that end a row.
    pub eos_token_ids: Vec<u32>,
}

impl Default for EngineConfig {
    /// Eight rows of 512 tokens each, 128 of them generated, always the best token.
    fn default() -> Self {
        Self {
            max_batch_size: 8,
            max_seq_len: 512,
            max_gen_len: 128,
            sampling: Sampling::default(),
            stop_strings: Vec::new(),
            eos_token_ids: Vec::new(),
        }
    }
}

/// Generates rows in slots; a slot whose row has ended is given to the next request.
///
/// Every rank of a tensor-parallel group has its own engine and must make the same calls with the
/// same requests; all of them then see the same events.
pub struct Engine<'a> {
    model: &'a Llama,
    tokenizer: &'a Tokenizer,
    comm: &'a dyn Communicator,
    config: EngineConfig,
    stop: StopRule,
    sampler: Sampler,
    storage: Storage,
    cache: SlotCache,
    prefix: Option<SharedPrefix>,
    slots: Vec<Option<Row<'a>>>,
    statistics: Statistics,
}

/// What a run is given by its caller.
struct Caller<'c> {
    source: &'c mut dyn FnMut() -> Option<Request>,
    sink: &'c mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    drained: bool,
    stop: bool,
}

impl Caller<'_> {
    fn next(&mut self) -> Option<Request> {
        if self.drained || self.stop {
            return None;
        }
        let request = (self.source)();
        self.drained = request.is_none();
        request
    }

    fn tell(&mut self, event: Event<'_>) {
        self.stop |= (self.sink)(event).is_break();
    }
}

impl<'a> Engine<'a> {
    /// Makes room for the rows.
    ///
    /// # Errors
    /// Settings out of range, a tokenizer of another model, a group of another size than the model
    /// was loaded for, not enough memory for the rows' keys and values.
    pub fn new(
        model: &'a Llama,
        tokenizer: &'a Tokenizer,
        comm: &'a dyn Communicator,
        config: EngineConfig,
    ) -> Result<Self> {
        validate(model, tokenizer, comm, &config)?;
        let storage = Storage {
            device: model.device(),
            kind: model.kind(),
            num_hidden_layers: model.layers().len(),
            pack: model.packs(),
        };
        let (slots, capacity) = (config.max_batch_size as i64, config.max_seq_len as i64);
        let cache = SlotCache::new(model.heads(), &storage, slots, capacity)?;
        let stop = StopRule::new(config.eos_token_ids.clone(), config.stop_strings.clone());
        Ok(Self {
            model,
            tokenizer,
            comm,
            stop,
            sampler: Sampler::new(config.sampling),
            storage,
            cache,
            prefix: None,
            slots: (0..config.max_batch_size).map(|_| None).collect(),
            statistics: Statistics::default(),
            config,
        })
    }

    /// Runs a prefix once; rows that begin with it, or with a part of it, take its keys and values
    /// from here on. It replaces an earlier one.
    ///
    /// Every rank of the group must call this.
    ///
    /// # Errors
    /// The prefix leaves no room in the model's context, a token is not in the vocabulary, memory
    /// ends, the exchange between ranks failed.
    pub fn pin_prefix(&mut self, tokens: &[u32]) -> Result<()> {
        let context = self.model.config().max_position_embeddings;
        let length = tokens.len() as i64;
        if length >= context {
            return Err(Error::PrefixTooLong { tokens: tokens.len(), context });
        }
        if tokens.is_empty() {
            self.prefix = None;
            return Ok(());
        }
        let mut prefix = SharedPrefix::new(tokens.to_vec());
        let (heads, storage) = (self.model.heads(), &self.storage);
        tch::no_grad(|| -> Result<()> {
            let positions: Vec<i64> = (0..length).collect();
            let x = self.model.embed(tokens)?;
            let _ = self.model.forward_layers(x, &positions, self.comm, &mut |_, q, k, v| {
                prefix.push_layer(heads, storage, k, v)?;
                causal_attention(heads, q, k, v, &[length])
            })?;
            Ok(())
        })?;
        self.prefix = Some(prefix);
        Ok(())
    }

    /// The pinned prefix.
    pub fn prefix(&self) -> Option<&SharedPrefix> {
        self.prefix.as_ref()
    }

    /// Generates until `source` has no more requests and all rows have ended, or until `sink` asks to
    /// stop; rows that are under way are given up then.
    ///
    /// Every rank of the group must call this with the same requests. A rank's wish to stop reaches
    /// all of them with the next tokens.
    ///
    /// # Errors
    /// Logits that are not finite, a token that is not in the vocabulary, no memory, a failed
    /// exchange between ranks. A request that is empty or too long is not an error but an event.
    pub fn run(
        &mut self,
        source: &mut dyn FnMut() -> Option<Request>,
        sink: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Statistics> {
        self.statistics = Statistics::default();
        self.slots.fill_with(|| None);
        let mut caller = Caller { source, sink, drained: false, stop: false };
        tch::no_grad(|| self.run_rows(&mut caller))?;
        Ok(self.statistics)
    }

    fn run_rows(&mut self, caller: &mut Caller<'_>) -> Result<()> {
        loop {
            let admitted = self.admit(caller);
            self.close_gaps()?;
            let started = Instant::now();
            if admitted > 0 {
                self.prefill(admitted, caller)?;
                self.statistics.prefill_seconds += started.elapsed().as_secs_f64();
            } else if self.slots[0].is_some() {
                self.decode(caller)?;
                self.statistics.decode_seconds += started.elapsed().as_secs_f64();
            } else {
                return Ok(());
            }
            if self.statistics.stopped {
                return Ok(());
            }
        }
    }

    /// Fills free slots; gives the number of new rows.
    fn admit(&mut self, caller: &mut Caller<'_>) -> usize {
        let (mut admitted, mut tokens) = (0, 0);
        for slot in 0..self.slots.len() {
            while self.slots[slot].is_none() && tokens < PREFILL_TOKENS {
                let Some(request) = caller.next() else { return admitted };
                match self.row(request) {
                    Ok(row) => {
                        tokens += row.suffix().len();
                        admitted += 1;
                        self.slots[slot] = Some(row);
                    }
                    Err(rejected) => {
                        self.statistics.rejected += 1;
                        caller.tell(rejected);
                    }
                }
            }
        }
        admitted
    }

    /// The row of a request, or the event that it is rejected.
    fn row(&self, request: Request) -> std::result::Result<Row<'a>, Event<'static>> {
        let tokens = &request.tokens;
        let prefix = self.prefix.as_ref().map_or(0, |prefix| prefix.shared_with(tokens));
        let own = tokens.len() - prefix;
        let context = self.model.config().max_position_embeddings as usize;
        let room = self.config.max_seq_len.min(context.saturating_sub(prefix));
        if own > 0 && own < room {
            let limit = self.config.max_gen_len.min(room - own);
            return Ok(Row::new(request, self.tokenizer, prefix, limit));
        }
        let reason = if own == 0 {
            "the prompt has no tokens".to_owned()
        } else {
            format!(
                "the prompt has {own} tokens behind {prefix} of the shared prefix, and a row has room \
                 for {room}, one of them for its output (max_seq_len {}, context {context})",
                self.config.max_seq_len
            )
        };
        Err(Event::Rejected { id: request.id, reason })
    }

    /// Moves the last rows into empty slots before them, so that the rows are in the slots `0..B`.
    fn close_gaps(&mut self) -> Result<()> {
        let mut end = self.slots.len();
        for slot in 0..self.slots.len() {
            while end > slot && self.slots[end - 1].is_none() {
                end -= 1;
            }
            if slot >= end || self.slots[slot].is_some() {
                continue;
            }
            end -= 1;
            if let Some(row) = self.slots[end].take() {
                // A row that was just admitted has nothing in its slot yet.
                if row.is_started() {
                    self.cache.move_row(end, slot, row.own_len() - 1)?;
                }
                self.slots[slot] = Some(row);
            }
        }
        Ok(())
    }

    /// Reads the prompts of the rows that have just been admitted.
    fn prefill(&mut self, admitted: usize, caller: &mut Caller<'_>) -> Result<()> {
        let rows: Vec<(usize, &Row<'_>)> = self
            .slots
            .iter()
            .enumerate()
            .filter_map(|(slot, row)| row.as_ref().map(|row| (slot, row)))
            .filter(|(_, row)| !row.is_started())
            .collect();
        debug_assert_eq!(rows.len(), admitted);
        let slots: Vec<usize> = rows.iter().map(|&(slot, _)| slot).collect();
        let (mut ids, mut positions) = (Vec::new(), Vec::new());
        let (mut steps, mut last) = (Vec::new(), Vec::new());
        for &(slot, row) in &rows {
            ids.extend_from_slice(row.suffix());
            positions.extend((row.prefix..).take(row.suffix().len()).map(|at| at as i64));
            steps.push(StepRow {
                slot: slot as i64,
                length: row.suffix().len() as i64,
                prefix: row.prefix as i64,
            });
            last.push(ids.len() as i64 - 1);
        }
        self.statistics.prompt_tokens += ids.len() as u64;
        let (model, heads, prefix) = (self.model, self.model.heads(), self.prefix.as_ref());
        let step = PrefillStep::new(heads, model.device(), &steps, prefix);
        let cache = &mut self.cache;
        let x = model.embed(&ids)?; // (T, C)
        let x = model.forward_layers(x, &positions, self.comm, &mut |layer, q, k, v| {
            step.attend(cache, prefix, heads, layer, [q, k, v])
        })?;
        let last = Tensor::from_slice(&last).to_device(model.device());
        self.finish_step(&x.f_index_select(0, &last)?, &slots, caller)
    }

    /// One token more for each row.
    fn decode(&mut self, caller: &mut Caller<'_>) -> Result<()> {
        let rows: Vec<&Row<'_>> = self.slots.iter().map_while(Option::as_ref).collect();
        let slots: Vec<usize> = (0..rows.len()).collect();
        let (ids, positions): (Vec<u32>, Vec<i64>) = rows.iter().map(|row| row.last()).unzip();
        let steps: Vec<StepRow> = (0..)
            .zip(&rows)
            .map(|(slot, row)| StepRow { slot, length: row.own_len(), prefix: row.prefix as i64 })
            .collect();
        self.statistics.decode_steps += 1;
        self.statistics.decode_tokens += rows.len() as u64;
        let (model, heads, prefix) = (self.model, self.model.heads(), self.prefix.as_ref());
        let step = DecodeStep::new(heads, model.device(), &steps, prefix);
        let cache = &mut self.cache;
        let x = model.embed(&ids)?; // (B, C)
        let x = model.forward_layers(x, &positions, self.comm, &mut |layer, q, k, v| {
            step.attend(cache, prefix, heads, layer, [q, k, v])
        })?;
        self.finish_step(&x, &slots, caller)
    }

    /// Chooses the next token of each of these rows from its last hidden state, `(B, C)`.
    fn finish_step(&mut self, x: &Tensor, slots: &[usize], caller: &mut Caller<'_>) -> Result<()> {
        let keys: Vec<RowKey<'_>> =
            slots.iter().filter_map(|&slot| self.slots[slot].as_ref().map(Row::key)).collect();
        let local = self.model.head(&self.model.final_norm(x))?; // (B, W)
        let chosen = if self.comm.world_size() > 1 && self.config.sampling.is_greedy() {
            self.best_of_ranks(&local, &keys)?
        } else {
            let logits = self.model.gather_logits(local, self.comm)?;
            self.sampler.choose(&logits, &keys)?
        };
        let (tokens, stopped) = self.agree(&chosen, caller.stop)?;
        self.statistics.output_tokens += tokens.len() as u64;
        for (&slot, token) in slots.iter().zip(tokens) {
            let Some(mut row) = self.slots[slot].take() else { continue };
            let text = row.push(token, &self.stop).to_owned();
            if !text.is_empty() {
                caller.tell(Event::Token { id: row.id(), text: &text });
            }
            match row.into_finished() {
                Ok(finished) => {
                    self.statistics.finished += 1;
                    caller.tell(Event::Finished(finished));
                }
                Err(row) => self.slots[slot] = Some(*row),
            }
        }
        // Alone, a wish to stop needs no agreement and takes effect at once.
        self.statistics.stopped = stopped || (self.comm.world_size() == 1 && caller.stop);
        Ok(())
    }

    /// The best token of each row, from each rank's best of its own rows of the vocabulary.
    fn best_of_ranks(&self, local: &Tensor, keys: &[RowKey<'_>]) -> Result<Vec<u32>> {
        let (max, index) = local.max_dim(-1, true); // (B, 1)
        let index = index + self.model.rank_plan().vocab.start;
        // In f64, which holds an f32 and a token id alike.
        let own = Tensor::f_cat(&[max.to_kind(Kind::Double), index.to_kind(Kind::Double)], 1)?;
        let all = self.comm.all_gather(&own)?.view([-1, keys.len() as i64, 2]); // (tp, B, 2)
        let (max, rank) = all.select(2, 0).max_dim(0, false); // (B)
        check_finite(&max.to_kind(Kind::Float), keys)?;
        let best = all.select(2, 1).gather(0, &rank.unsqueeze(0), false).view(-1); // (B)
        Ok(Vec::<i64>::try_from(best.to_kind(Kind::Int64))?
            .into_iter()
            .map(|id| id as u32)
            .collect())
    }

    /// The tokens that rank 0 has chosen, and whether any rank wishes to stop.
    fn agree(&self, chosen: &[u32], stop: bool) -> Result<(Vec<u32>, bool)> {
        if self.comm.world_size() == 1 {
            return Ok((chosen.to_vec(), stop));
        }
        let own = if self.comm.rank() == 0 { 1 } else { 0 };
        let mut message: Vec<i64> = chosen.iter().map(|&token| i64::from(token) * own).collect();
        message.push(i64::from(stop));
        let mut message = Tensor::from_slice(&message);
        self.comm.all_reduce_max(&mut message)?;
        let mut message = Vec::<i64>::try_from(message)?;
        let stop = message.pop() == Some(1);
        Ok((message.into_iter().map(|token| token as u32).collect(), stop))
    }
}

fn validate(
    model: &Llama,
    tokenizer: &Tokenizer,
    comm: &dyn Communicator,
    config: &EngineConfig,
) -> Result<()> {
    let EngineConfig { max_batch_size, max_seq_len, max_gen_len, .. } = *config;
    for (name, value, least) in [
        ("max_batch_size", max_batch_size, 1),
        ("max_seq_len", max_seq_len, 2),
        ("max_gen_len", max_gen_len, 1),
    ] {
        if value < least {
            let expected = if least == 1 { "at least 1" } else { "at least 2" };
            return Err(Error::Setting { name, expected, got: value as f64 });
        }
    }
    config.sampling.validate()?;
    let (expected, got) = (model.plan().tp(), comm.world_size());
    if expected != got {
        return Err(Error::GroupSize { expected, got });
    }
    check_tokenizer(model.config(), tokenizer)
}
