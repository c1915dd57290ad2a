//! The loop: admit, prefill, decode, retire.

// Shapes: B = rows, T = tokens of all rows, C = hidden_size, W = this rank's rows of the vocabulary.

use std::{ops::ControlFlow, time::Instant};

use dromedary_parallel::{Communicator, fault_point};
use dromedary_tokenizer::Tokenizer;
use dromedary_torch_ext::release_free_memory;
use tch::Tensor;

use super::{
    Event, Request, Sampling, Statistics, StopRule,
    prefill::{Prompt, read_prompts},
    row::Row,
    sampler::{RowKey, Sampler, Vocabulary},
};
use crate::{
    Error, Llama, Result, check_tokenizer,
    kv_cache::{LayerStep, SharedPrefix, SlotCache, Step, StepRow, Storage},
};

/// Prompts are read together until they have this many tokens: enough to keep the products wide,
/// few enough to bound the memory of a prefill.
pub(crate) const PREFILL_TOKENS: usize = 512;

/// Slots are made this much longer at once, so that they are not copied for every row that is a
/// little longer than those before.
const KV_BUCKET: usize = 128;

/// Environment variables, and their values, under which a CPU's libtorch gives a row of a matrix the
/// same bits in any place, as [`EngineConfig::deterministic`] needs where weights are not packed. MKL
/// reads them at its first product: set them before the process starts. With `MKL_CBWR=COMPATIBLE` rows differ.
pub const DETERMINISTIC_ENVIRONMENT: [(&str, &str); 2] =
    [("MKL_CBWR", "AVX2"), ("MKL_DYNAMIC", "FALSE")];

/// How rows see the pinned prefix.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PrefixUse {
    /// All rows attend to the one copy.
    #[default]
    Shared,
    /// Each row's slot begins with a copy of it, so slots must be that much longer. This is what sharing
    /// saves, for measurements; only the CPU's own kernels can.
    Copied,
}

/// How an [`Engine`] generates.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Rows that are generated at once.
    pub max_batch_size: usize,
    /// Tokens of a row's own, prompt and output, behind the pinned prefix.
    pub max_seq_len: usize,
    /// Tokens that a row may generate.
    pub max_gen_len: usize,
    /// Tokens of all slots together, whose keys and values are held: a row is admitted when it fits.
    /// All slots have the length that the longest row under way may need. Without a number,
    /// `max_batch_size` rows of `max_seq_len` tokens fit.
    pub max_kv_tokens: Option<usize>,
    /// How rows see the pinned prefix.
    pub prefix_use: PrefixUse,
    /// Compute every step in the same shapes, so that a row's tokens depend on no other row to the
    /// last bit: all slots are computed and read to their ends, prompts are read one by one. Costs
    /// time, and needs memory for all slots at their full length. Number of threads, ranks and
    /// slots must be the same in runs that are to be equal. Weights that are not packed need
    /// [`DETERMINISTIC_ENVIRONMENT`] too.
    pub deterministic: bool,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Texts that end a row.
    pub stop_strings: Vec<String>,
    /// Tokens that end a row.
    pub eos_token_ids: Vec<u32>,
}

impl Default for EngineConfig {
    /// Eight rows of 512 tokens each, 128 of them generated, always the best token, until the text
    /// begins a user's next turn as the original's prompt writes it.
    fn default() -> Self {
        Self {
            max_batch_size: 8,
            max_seq_len: 512,
            max_gen_len: 128,
            max_kv_tokens: None,
            prefix_use: PrefixUse::Shared,
            deterministic: false,
            sampling: Sampling::default(),
            stop_strings: vec!["\n\nUser:".to_owned()],
            eos_token_ids: Vec::new(),
        }
    }
}

impl EngineConfig {
    pub(super) fn max_kv_tokens(&self) -> usize {
        self.max_kv_tokens.unwrap_or(self.max_batch_size.saturating_mul(self.max_seq_len))
    }
}

/// Generates rows in slots; a slot whose row has ended is given to the next request.
///
/// Every rank of a tensor-parallel group has its own engine and must make the same calls with the
/// same requests; all of them then see the same events.
pub struct Engine<'a> {
    pub(super) model: &'a Llama,
    tokenizer: &'a Tokenizer,
    pub(super) comm: &'a dyn Communicator,
    pub(super) config: EngineConfig,
    stop: StopRule,
    sampler: Sampler,
    pub(super) storage: Storage,
    pub(super) cache: SlotCache,
    pub(super) prefix: Option<SharedPrefix>,
    slots: Vec<Option<Row<'a>>>,
    /// A row that the cache had no room for yet.
    waiting: Option<Row<'a>>,
    statistics: Statistics,
    on_step: Option<OnStep<'a>>,
}

/// What is called once in each step.
type OnStep<'a> = Box<dyn FnMut() -> Result<()> + 'a>;

/// What a run is given by its caller.
struct Caller<'c> {
    source: &'c mut dyn FnMut() -> Option<Request>,
    sink: &'c mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    drained: bool,
    stop: bool,
    /// Whether no other rank takes part.
    alone: bool,
}

impl Caller<'_> {
    /// Ranks must admit the same rows: a wish to stop ends the requests only where nobody else needs to
    /// know of it first.
    fn next(&mut self) -> Option<Request> {
        if self.drained || (self.stop && self.alone) {
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
        mut config: EngineConfig,
    ) -> Result<Self> {
        // No row is longer than the context, whatever its slot could hold.
        let context = model.config().max_position_embeddings as usize;
        config.max_seq_len = config.max_seq_len.min(context);
        validate(model, tokenizer, comm, &config)?;
        let storage = Storage {
            device: model.device(),
            kind: model.kind(),
            num_hidden_layers: model.layers().len(),
            kernels: model.kernels(),
        };
        let cache = SlotCache::new(model.heads(), &storage, 0, 0)?;
        let stop = StopRule::new(config.eos_token_ids.clone(), config.stop_strings.clone());
        Ok(Self {
            model,
            tokenizer,
            comm,
            stop,
            sampler: Sampler::new(config.sampling.clone(), tokenizer),
            storage,
            cache,
            prefix: None,
            waiting: None,
            slots: (0..config.max_batch_size).map(|_| None).collect(),
            statistics: Statistics::default(),
            on_step: None,
            config,
        })
    }

    /// Has this called at the beginning of each step, in which rows' prompts are read or each row
    /// gets a token: the place where ranks look after each other, such as by
    /// [`WorkQueue::poll`](dromedary_parallel::WorkQueue::poll). It must not wait.
    pub fn on_step(&mut self, call: impl FnMut() -> Result<()> + 'a) {
        self.on_step = Some(Box::new(call));
    }

    /// Generates until `source` has no more requests and all rows have ended, or until `sink` asks to
    /// stop; rows that are under way are given up then.
    ///
    /// Every rank of the group must call this with the same requests. A rank's wish to stop reaches
    /// all of them with the next tokens.
    ///
    /// # Errors
    /// A token that is not in the vocabulary, no memory, a failed exchange between ranks. A request that
    /// is empty or too long is not an error but an event, and so are logits that are not finite.
    pub fn run(
        &mut self,
        source: &mut dyn FnMut() -> Option<Request>,
        sink: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Statistics> {
        self.statistics = Statistics::default();
        let before = self.comm.collective_seconds();
        self.slots.fill_with(|| None);
        self.waiting = None;
        let alone = self.comm.world_size() == 1;
        let mut caller = Caller { source, sink, drained: false, stop: false, alone };
        let result = tch::no_grad(|| self.run_rows(&mut caller));
        self.forget_slots_unless(result)?;
        self.statistics.collective_seconds = self.comm.collective_seconds() - before;
        Ok(self.statistics)
    }

    /// Behind an error nobody knows what the slots hold, and the next rows must not depend on it.
    pub(super) fn forget_slots_unless<T>(&mut self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.cache = SlotCache::new(self.model.heads(), &self.storage, 0, 0)?;
        }
        result
    }

    fn run_rows(&mut self, caller: &mut Caller<'_>) -> Result<()> {
        let begun = Instant::now();
        loop {
            if let Some(on_step) = &mut self.on_step {
                on_step()?;
            }
            fault_point("step", self.statistics.decode_steps as usize)?;
            let admitted = self.admit(caller);
            self.close_gaps()?;
            let started = Instant::now();
            if admitted > 0 {
                self.make_room()?;
                self.prefill(caller)?;
                self.statistics.prefill_seconds += started.elapsed().as_secs_f64();
            } else if self.slots[0].is_some() {
                let full = self.slots.iter().all(Option::is_some);
                self.decode(caller)?;
                let seconds = started.elapsed().as_secs_f64();
                self.statistics.decode_seconds += seconds;
                if full {
                    self.statistics.full_steps += 1;
                    self.statistics.full_seconds += seconds;
                }
            } else {
                // A wish to stop may have come with the last row's end, or with a rejected one.
                self.statistics.stopped = self.agree(&[], caller.stop)?.1;
                return Ok(());
            }
            if !caller.drained {
                self.statistics.queue_tokens = self.statistics.output_tokens;
                self.statistics.queue_seconds = begun.elapsed().as_secs_f64();
            }
            if self.statistics.stopped {
                return Ok(());
            }
        }
    }

    /// Fills free slots as long as the cache has tokens for it; gives the number of new rows. The
    /// requests are taken in their order: one that does not fit yet is waited for.
    fn admit(&mut self, caller: &mut Caller<'_>) -> usize {
        let (mut admitted, mut tokens) = (0, 0);
        while tokens < PREFILL_TOKENS {
            let Some(slot) = self.slots.iter().position(Option::is_none) else { break };
            let Some(row) = self.waiting.take().or_else(|| self.next_row(caller)) else { break };
            if !self.fits(&row) {
                self.waiting = Some(row);
                break;
            }
            tokens += row.suffix().len();
            admitted += 1;
            self.slots[slot] = Some(row);
        }
        admitted
    }

    /// The next request that can be run.
    fn next_row(&mut self, caller: &mut Caller<'_>) -> Option<Row<'a>> {
        loop {
            match self.row(caller.next()?) {
                Ok(row) => return Some(row),
                Err(rejected) => {
                    self.statistics.rejected += 1;
                    caller.tell(rejected);
                }
            }
        }
    }

    /// Whether the cache can hold this row beside those that are under way: all slots have the
    /// length of the longest one.
    fn fits(&self, row: &Row<'_>) -> bool {
        let rows = self.slots.iter().flatten().count() + 1;
        rows * self.capacity(Some(row)) <= self.config.max_kv_tokens()
    }

    /// The length that all slots need for the rows that are under way, and for this one.
    fn capacity(&self, new: Option<&Row<'_>>) -> usize {
        let longest = self.slots.iter().flatten().chain(new).map(Row::reserved).max().unwrap_or(0);
        let bucket = longest.next_multiple_of(KV_BUCKET);
        if self.config.deterministic {
            self.config.max_seq_len
        } else {
            // A bucket may pass what the whole cache has; the row itself does not.
            bucket.min(self.config.max_seq_len).min(self.config.max_kv_tokens()).max(longest)
        }
    }

    /// Gives the cache slots that are long enough and as many as there is memory for.
    fn make_room(&mut self) -> Result<()> {
        let rows = if self.config.deterministic {
            self.config.max_batch_size
        } else {
            self.slots.iter().flatten().count()
        };
        let capacity = self.capacity(None);
        let (slots, length) = self.cache.size();
        if rows as i64 <= slots && capacity as i64 <= length {
            return Ok(());
        }
        let slots = (self.config.max_kv_tokens() / capacity).min(self.config.max_batch_size);
        let lengths: Vec<i64> =
            self.slots.iter().map_while(Option::as_ref).map(Row::stored).collect();
        self.cache.resize(slots as i64, capacity as i64, &lengths)
    }

    /// Tokens of its own that a row may have behind this much of the prefix.
    pub(super) fn room(&self, prefix: usize) -> usize {
        let context = self.model.config().max_position_embeddings as usize;
        let slot = self.config.max_seq_len.min(self.config.max_kv_tokens());
        slot.min(context.saturating_sub(prefix))
    }

    /// The row of a request, or the event that it is rejected.
    fn row(&self, request: Request) -> std::result::Result<Row<'a>, Event<'static>> {
        let tokens = &request.tokens;
        let shared = self.prefix.as_ref().map_or(0, |prefix| prefix.shared_with(tokens));
        let [prefix, copied] = match self.config.prefix_use {
            PrefixUse::Shared => [shared, 0],
            PrefixUse::Copied => [0, shared],
        };
        let own = tokens.len() - prefix;
        let context = self.model.config().max_position_embeddings as usize;
        let room = self.room(prefix);
        if own > 0 && own < room {
            let limit = self.config.max_gen_len.min(room - own);
            return Ok(Row::new(request, self.tokenizer, [prefix, copied], limit));
        }
        let reason = if own == 0 {
            "the prompt has no tokens".to_owned()
        } else {
            format!(
                "the prompt has {own} tokens behind {prefix} of the shared prefix, and a row has room \
                 for {room}, one of them for its output (max_seq_len {}, context {context})",
                self.config.max_seq_len.min(self.config.max_kv_tokens())
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
                    self.cache.move_row(end, slot, row.stored())?;
                }
                self.slots[slot] = Some(row);
            }
        }
        Ok(())
    }

    /// Reads the prompts of the rows that have just been admitted: all at once, or one by one where
    /// a row's numbers must not depend on the others.
    fn prefill(&mut self, caller: &mut Caller<'_>) -> Result<()> {
        let new = |row: &Option<Row<'_>>| row.as_ref().is_some_and(|row| !row.is_started());
        let slots: Vec<usize> = self
            .slots
            .iter()
            .enumerate()
            .filter(|(_, row)| new(row))
            .map(|(slot, _)| slot)
            .collect();
        let at_once = if self.config.deterministic { 1 } else { slots.len() };
        for slots in slots.chunks(at_once.max(1)) {
            self.prefill_rows(slots, caller)?;
            if self.statistics.stopped {
                break;
            }
        }
        Ok(())
    }

    fn prefill_rows(&mut self, slots: &[usize], caller: &mut Caller<'_>) -> Result<()> {
        let rows = slots.iter().filter_map(|&slot| Some((slot, self.slots[slot].as_ref()?)));
        let prompts: Vec<Prompt<'_>> = rows
            .map(|(slot, row)| Prompt {
                slot,
                prefix: row.prefix,
                copied: row.copied,
                tokens: row.suffix(),
            })
            .collect();
        for (prompt, prefix) in prompts.iter().zip(self.prefix.iter().cycle()) {
            self.cache.copy_prefix(prefix, prompt.slot, prompt.copied);
        }
        let last: Vec<i64> = prompts
            .iter()
            .scan(-1, |last, prompt| {
                *last += prompt.tokens.len() as i64;
                Some(*last)
            })
            .collect();
        let tokens = last.last().map_or(0, |last| *last as usize + 1);
        self.statistics.prompt_tokens += tokens as u64;
        let x =
            read_prompts(self.model, self.comm, &mut self.cache, self.prefix.as_ref(), &prompts)?;
        let last = Tensor::from_slice(&last).to_device(self.model.device());
        let x = x.f_index_select(0, &last)?; // (B, C)
        if tokens >= PREFILL_TOKENS {
            // The next pass would scatter its own among what this one has left.
            release_free_memory();
        }
        let logits = self.model.head(&self.model.final_norm(&x))?; // (B, W)
        self.finish_step(&logits, slots, caller)
    }

    /// One token more for each row.
    fn decode(&mut self, caller: &mut Caller<'_>) -> Result<()> {
        let rows: Vec<&Row<'_>> = self.slots.iter().map_while(Option::as_ref).collect();
        let slots: Vec<usize> = (0..rows.len()).collect();
        let (mut ids, mut positions): (Vec<u32>, Vec<i64>) =
            rows.iter().map(|row| row.last()).unzip();
        let mut steps: Vec<StepRow> = (0..)
            .zip(&rows)
            .map(|(slot, row)| StepRow {
                slot,
                new: 1,
                length: row.own_len(),
                prefix: row.prefix as i64,
            })
            .collect();
        self.statistics.decode_steps += 1;
        self.statistics.decode_tokens += rows.len() as u64;
        let (model, heads, prefix) = (self.model, self.model.heads(), self.prefix.as_ref());
        let mut keys = 0;
        if self.config.deterministic {
            // Every step has the same shapes: empty slots are computed too, and slots are read to
            // their ends.
            let seen = prefix.map_or(0, |prefix| prefix.len() as i64);
            for slot in rows.len()..self.config.max_batch_size {
                ids.push(0);
                positions.push(seen);
                steps.push(StepRow { slot: slot as i64, new: 1, length: 1, prefix: seen });
            }
            keys = self.cache.size().1;
        }
        let cache = &mut self.cache;
        let mut step = Step::decode(cache, heads, model.device(), &steps, prefix, keys);
        let x = model.embed(&ids)?; // (B, C)
        let x = model.forward_layers(x, &positions, self.comm, &mut |layer, q, k, v| {
            step.attend(cache, LayerStep { layer, heads, prefix, q, k, v })
        })?;
        let logits = model.head(&model.final_norm(&x))?; // (B, W)
        self.finish_step(&logits.narrow(0, 0, slots.len() as i64), &slots, caller)
    }

    /// Chooses the next token of each of these rows from this rank's logits, `(B, W)`.
    fn finish_step(
        &mut self,
        logits: &Tensor,
        slots: &[usize],
        caller: &mut Caller<'_>,
    ) -> Result<()> {
        let chosen = self.choose(logits, slots)?;
        let (tokens, stopped) = self.agree(&chosen, caller.stop)?;
        self.statistics.output_tokens += tokens.iter().flatten().count() as u64;
        for (&slot, token) in slots.iter().zip(tokens) {
            let Some(mut row) = self.slots[slot].take() else { continue };
            let Some(token) = token else {
                self.cache.clear(slot)?;
                caller.tell(self.failed(&row));
                continue;
            };
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
        self.statistics.stopped = stopped || (caller.alone && caller.stop);
        Ok(())
    }

    /// Counts a row whose logits are not finite: its tokens are part of no answer.
    fn failed(&mut self, row: &Row<'_>) -> Event<'static> {
        let RowKey { id, position, .. } = row.key();
        self.statistics.failed += 1;
        self.statistics.output_tokens -= position;
        // The first came from the prompt, and the step that gave none has counted one.
        self.statistics.decode_tokens -= position;
        Event::Failed { id: id.to_owned(), position }
    }

    fn choose(&mut self, logits: &Tensor, slots: &[usize]) -> Result<Vec<Option<u32>>> {
        let keys: Vec<RowKey<'_>> =
            slots.iter().filter_map(|&slot| self.slots[slot].as_ref().map(Row::key)).collect();
        let vocabulary = Vocabulary {
            comm: self.comm,
            rows: self.model.rank_plan().vocab.clone(),
            gather: &|local| self.model.gather_logits(local, self.comm),
        };
        let chosen = self.sampler.choose(logits.shallow_clone(), &vocabulary, &keys)?;
        self.statistics.gathered_rows += self.sampler.take_gathered_rows();
        Ok(chosen)
    }

    /// The tokens that rank 0 has chosen, and whether any rank wishes to stop.
    fn agree(&self, chosen: &[Option<u32>], stop: bool) -> Result<(Vec<Option<u32>>, bool)> {
        if self.comm.world_size() == 1 {
            return Ok((chosen.to_vec(), stop));
        }
        // Rank 0 gives what is one more than the token, and 0 for none as all others do.
        let leads = self.comm.rank() == 0;
        let code =
            |token: &Option<u32>| token.filter(|_| leads).map_or(0, |token| i64::from(token) + 1);
        let mut message: Vec<i64> = chosen.iter().map(code).collect();
        message.push(i64::from(stop));
        let mut message = Tensor::from_slice(&message);
        self.comm.all_reduce_max(&mut message)?;
        let mut message = Vec::<i64>::try_from(message)?;
        let stop = message.pop() == Some(1);
        let token = |code: i64| code.checked_sub(1).and_then(|token| u32::try_from(token).ok());
        Ok((message.into_iter().map(token).collect(), stop))
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
        ("max_kv_tokens", config.max_kv_tokens(), 2),
    ] {
        if value < least {
            let expected = if least == 1 { "at least 1" } else { "at least 2" };
            return Err(Error::Setting { name, expected, got: value as f64 });
        }
    }
    config.sampling.validate(model.config().vocab_size)?;
    let (needed, got) = (max_batch_size.saturating_mul(max_seq_len), config.max_kv_tokens());
    if config.deterministic && got < needed {
        let expected = "max_batch_size x max_seq_len with deterministic";
        return Err(Error::Setting { name: "max_kv_tokens", expected, got: got as f64 });
    }
    if config.prefix_use == PrefixUse::Copied && model.kernels().is_none() {
        return Err(Error::CopiedPrefix);
    }
    let (expected, got) = (model.plan().tp(), comm.world_size());
    if expected != got {
        return Err(Error::GroupSize { expected, got });
    }
    check_tokenizer(model.config(), tokenizer)
}
