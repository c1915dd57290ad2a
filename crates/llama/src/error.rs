use std::{fmt, io, path::PathBuf};

use crate::logit_check::LogitDifference;

/// A result with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be opened, read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A JSON file is not JSON, or a key holds a value of another type than the format says.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong and where.
        source: serde_json::Error,
    },
    /// A model configuration contradicts itself or lacks something.
    #[error("{}: {message}", path.display())]
    Config {
        /// The configuration file.
        path: PathBuf,
        /// What is wrong, with the numbers.
        message: String,
    },
    /// A file asks for something that this crate does not compute. Ignoring it would give another
    /// model than the one that was meant.
    #[error("{}: {key} = {value} is not supported (supported: {supported})", path.display())]
    Unsupported {
        /// The configuration file.
        path: PathBuf,
        /// The key as the file has it.
        key: &'static str,
        /// Its value.
        value: String,
        /// What would be accepted.
        supported: &'static str,
    },
    /// The model cannot be split over so many ranks.
    #[error(
        "tp = {tp} is not in 1..={count}: the model has {count} {what}, and every rank needs one"
    )]
    TooManyRanks {
        /// The tensor-parallel size that was asked for.
        tp: usize,
        /// What there is too little of.
        what: &'static str,
        /// How many of them there are.
        count: i64,
    },
    /// A model cannot be cut into so many equal parts, which Meta's layout has.
    #[error("{what} = {size} is not a multiple of {count}, the number of files")]
    UnequalShards {
        /// The dimension.
        what: &'static str,
        /// Its size.
        size: i64,
        /// The files that were asked for.
        count: usize,
    },
    /// A weight in NF4 does not have the form that bitsandbytes gives it.
    #[error("{}: {name} in NF4: {message}", path.display())]
    Nf4 {
        /// The file.
        path: PathBuf,
        /// The weight.
        name: String,
        /// What is wrong with it.
        message: String,
    },
    /// A checkpoint of one file a rank is to be loaded by another number of ranks.
    #[error("{}: the checkpoint is cut for {expected} ranks, not for {got}", path.display())]
    CutForOthers {
        /// The folder.
        path: PathBuf,
        /// Ranks that it is cut for.
        expected: usize,
        /// Ranks that want to load it.
        got: usize,
    },
    /// A checkpoint that was written does not compute what its source does; it was not published.
    #[error(
        "{}: its logits differ from the source's: {difference}, allowed {allowed:.0e}",
        path.display()
    )]
    LogitsDiffer {
        /// The folder that was to be written.
        path: PathBuf,
        /// How far they are apart.
        difference: LogitDifference,
        /// How far they may be.
        allowed: f64,
    },
    /// A safetensors header is damaged, hostile or not a header at all.
    #[error("{}: not a valid safetensors file: {message}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A file of `torch.save` is damaged, hostile, or holds something else than tensors by name.
    #[error("{}: not a PyTorch file that can be read: {message}", path.display())]
    TorchFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A safetensors file is shorter than its header says, such as after an interrupted download.
    #[error(
        "{}: the file is truncated: its header describes {expected} bytes, it has {got}",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its length according to the header.
        expected: u64,
        /// Its length.
        got: u64,
    },
    /// The index of a sharded checkpoint and its files contradict each other.
    #[error("{}: {message}", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// Who disagrees about what.
        message: String,
    },
    /// A folder holds no checkpoint that can be read.
    #[error("{}: {message}", path.display())]
    NoCheckpoint {
        /// The folder.
        path: PathBuf,
        /// What was looked for, and what was found.
        message: String,
    },
    /// The tensors are not those of the model that the configuration describes.
    #[error("{}: the tensors do not fit config.json: {problems}", path.display())]
    WrongTensors {
        /// The checkpoint folder.
        path: PathBuf,
        /// All of them, by name.
        problems: TensorProblems,
    },
    /// A tensor was asked for that the checkpoint does not have.
    #[error("{}: there is no tensor named {name}", path.display())]
    NoSuchTensor {
        /// The checkpoint folder or file.
        path: PathBuf,
        /// The name that was asked for.
        name: String,
    },
    /// A slice was asked for that was planned for another model.
    #[error("{name}: a slice of dimension {dim} of size {expected} does not fit shape {got:?}")]
    ShardMismatch {
        /// The tensor.
        name: String,
        /// The dimension that the slice cuts.
        dim: i64,
        /// The size of that dimension in the plan.
        expected: i64,
        /// The shape of the stored tensor.
        got: Vec<i64>,
    },
    /// A weight is NaN or infinite.
    #[error("{}: tensor {name} holds {value} at element {element}", path.display())]
    NonFinite {
        /// The file that holds the tensor.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The first such element, counted in row-major order over the part that was read.
        element: u64,
        /// NaN or infinity.
        value: f64,
    },
    /// An adapter folder does not hold a LoRA adapter that this crate can apply.
    #[error("{}: {message}", path.display())]
    Adapter {
        /// The file that is to blame.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// An adapter was made for a model of another size.
    #[error(
        "adapter module {name} has lora_A {lora_a:?} and lora_B {lora_b:?}, but the base weight is \
         {base:?}"
    )]
    AdapterShape {
        /// The module.
        name: String,
        /// Shape of `lora_A`: (r, in).
        lora_a: Vec<i64>,
        /// Shape of `lora_B`: (out, r).
        lora_b: Vec<i64>,
        /// Shape of the base weight: (out, in).
        base: Vec<i64>,
    },
    /// The caller asked to stop; nothing was published.
    #[error("stopped on request")]
    Interrupted,
    /// A tokenizer and a model do not belong together.
    #[error("the tokenizer has {tokens} tokens, but the model's vocabulary has {vocab_size}")]
    TokenizerMismatch {
        /// Tokens of the tokenizer.
        tokens: usize,
        /// Rows of the model's embedding.
        vocab_size: i64,
    },
    /// A kind of numbers was asked for that weights cannot be held in.
    #[error("--dtype {name}: give auto, f32, bf16 or f16")]
    KindName {
        /// What was asked for.
        name: String,
    },
    /// A number of bits was asked for that linear layers cannot be kept in.
    #[error("--bits {bits}: {message}")]
    Bits {
        /// What was asked for.
        bits: u8,
        /// Why not.
        message: &'static str,
    },
    /// A file or folder could not be published.
    #[error(transparent)]
    Files(#[from] dromedary_files::Error),
    /// Tensors were given to a checkpoint writer that it was not created for, or not all of them.
    #[error("{}: {message}", path.display())]
    Write {
        /// The checkpoint folder that was being written.
        path: PathBuf,
        /// What did not fit.
        message: String,
    },
    /// The tokenizer could not be read.
    #[error(transparent)]
    Tokenizer(#[from] dromedary_tokenizer::Error),
    /// libtorch refused an operation, mostly for want of memory.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    /// A packed weight could not be made or used.
    #[error(transparent)]
    TorchExt(#[from] dromedary_torch_ext::Error),
    /// The ranks of a tensor-parallel group could not exchange data.
    #[error(transparent)]
    Parallel(#[from] dromedary_parallel::Error),
    /// Another rank could not do its part of a common task.
    #[error("rank {rank}: {message}")]
    OnRank {
        /// The rank.
        rank: usize,
        /// Its error.
        message: String,
    },
    /// A model was asked for that belongs to no rank of its group.
    #[error("tensor-parallel rank {rank} is not below the size {size} of its group")]
    GroupRank {
        /// The rank.
        rank: usize,
        /// The size of the group.
        size: usize,
    },
    /// A model is used with a group of another size than it was loaded for.
    #[error("the model was loaded for a group of {expected}, but the communicator has {got} ranks")]
    GroupSize {
        /// The group that it was loaded for.
        expected: usize,
        /// The size of the communicator.
        got: usize,
    },
    /// A token id is not in the model's vocabulary.
    #[error("token id {id} is not below vocab_size {vocab_size}")]
    TokenId {
        /// The id.
        id: u32,
        /// The size of the vocabulary.
        vocab_size: i64,
    },
    /// A setting of the generation is out of range.
    #[error("{name} is {got}, expected {expected}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        got: f64,
    },
    /// Rows were to have copies of the prefix where they cannot.
    #[error("only the CPU's own kernels, in f32, can copy the prefix to each row")]
    CopiedPrefix,
    /// A prefix leaves no room for rows behind it.
    #[error("the prefix has {tokens} tokens, and the model's context is {context}")]
    PrefixTooLong {
        /// Tokens of the prefix.
        tokens: usize,
        /// `max_position_embeddings`.
        context: i64,
    },
    /// A row cannot be scored.
    #[error("row {row} cannot be scored: {reason}")]
    CannotScore {
        /// Its number among the requests, from 0.
        row: usize,
        /// Why, with the numbers.
        reason: String,
    },
    /// A gradient is not one of what the plan gives the rank.
    #[error("a gradient is {got:?}, the rank holds {expected} of its dimension {dim}")]
    GradientShape {
        /// The dimension that the plan cuts.
        dim: usize,
        /// What the rank holds of it.
        expected: i64,
        /// The gradient's shape.
        got: Vec<i64>,
    },
    /// The model gave logits that are NaN or infinite.
    #[error("row {id}: the logits of its output token {position} are not finite")]
    NonFiniteLogits {
        /// The row.
        id: String,
        /// Number of tokens that the row had generated before.
        position: u64,
    },
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

/// How the tensors of a checkpoint differ from what its configuration asks for.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct TensorProblems {
    /// Tensors that the model needs and no file has.
    pub missing: Vec<String>,
    /// Tensors that the model has no place for.
    pub unexpected: Vec<String>,
    /// Tensors of another shape, each with the expected and the stored shape.
    pub misshapen: Vec<String>,
    /// Tensors of a data type other than F32, F16 and BF16, each with its type.
    pub wrong_dtype: Vec<String>,
}

impl TensorProblems {
    pub(crate) fn is_empty(&self) -> bool {
        self.missing.is_empty()
            && self.unexpected.is_empty()
            && self.misshapen.is_empty()
            && self.wrong_dtype.is_empty()
    }
}

impl fmt::Display for TensorProblems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A checkpoint of another model misses hundreds of names: the first ones say it.
        const SHOWN: usize = 24;
        let kinds = [
            ("missing", &self.missing),
            ("unexpected", &self.unexpected),
            ("wrong shape", &self.misshapen),
            ("wrong data type", &self.wrong_dtype),
        ];
        let mut separator = "";
        for (kind, names) in kinds.into_iter().filter(|(_, names)| !names.is_empty()) {
            write!(f, "{separator}{} {kind}: ", names.len())?;
            write!(f, "{}", names[..names.len().min(SHOWN)].join(", "))?;
            if names.len() > SHOWN {
                write!(f, " and {} more", names.len() - SHOWN)?;
            }
            separator = "; ";
        }
        Ok(())
    }
}
