//! LoRA adapters, in the files of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use dromedary_files::{AtomicDir, Manifest};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Tensor;

use crate::{
    checkpoint::{Dtype, SafetensorsWriter, TensorFile, TensorSpec, linear_shapes},
    config::LlamaConfig,
    error::{Error, Result},
    plan::Shard,
};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";

/// Settings of PEFT that give the factors another meaning, or other modules.
const OTHER_METHODS: [&str; 16] = [
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "layers_to_transform",
    "exclude_modules",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
];

/// Initialisations that take a part of the base away: their adapters do not fit the base as it is.
const CHANGED_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// The settings of an adapter, by PEFT's names.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rank of the low-rank factors.
    pub r: i64,
    /// Scale: the product of the factors is multiplied by `lora_alpha / r`.
    pub lora_alpha: f64,
    /// Dropout on the input of the adapter in training.
    pub lora_dropout: f64,
    /// Names of the adapted linear layers, such as `q_proj`.
    pub target_modules: BTreeSet<String>,
    /// Whether the scale is `lora_alpha / sqrt(r)` instead.
    pub use_rslora: bool,
    /// The checkpoint that the adapter was trained on; for people to read.
    pub base_model_name_or_path: Option<String>,
}

impl Default for LoraConfig {
    /// Dromedary-2's: r 64, alpha 16, no dropout, all linear layers but the head.
    fn default() -> Self {
        let all = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
        Self {
            r: 64,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            target_modules: all.map(String::from).into(),
            use_rslora: false,
            base_model_name_or_path: None,
        }
    }
}

impl LoraConfig {
    /// What the product of the factors is multiplied by.
    pub fn scaling(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    /// Names of all modules that the adapter has in a model, such as
    /// `model.layers.0.self_attn.q_proj`, with the (out, in) features of each.
    ///
    /// # Errors
    /// [`Error::Adapter`] if a target is not one of the model's seven linear layers.
    pub fn modules(&self, config: &LlamaConfig) -> Result<Vec<(String, [i64; 2])>> {
        let shapes = linear_shapes(config);
        let name_of = |path: &'static str| path.rsplit('.').next().unwrap_or(path);
        let known = shapes.map(|(path, _)| name_of(path));
        if let Some(other) = self.target_modules.iter().find(|name| !known.contains(&name.as_str()))
        {
            return Err(Error::Adapter {
                path: CONFIG.into(),
                message: format!("target module {other} is none of {}", known.join(", ")),
            });
        }
        let targets: Vec<_> = shapes
            .into_iter()
            .filter(|(path, _)| self.target_modules.contains(name_of(path)))
            .collect();
        Ok((0..config.num_hidden_layers)
            .flat_map(|layer| {
                targets
                    .iter()
                    .map(move |(path, shape)| (format!("model.layers.{layer}.{path}"), *shape))
            })
            .collect())
    }
}

/// The factors of one module.
#[derive(Debug)]
pub struct LoraPair {
    /// (r, in)
    pub lora_a: Tensor,
    /// (out, r)
    pub lora_b: Tensor,
}

/// An adapter in memory.
#[derive(Debug)]
pub struct Adapter {
    /// Its settings.
    pub config: LoraConfig,
    /// The factors by module, such as `model.layers.0.self_attn.q_proj`.
    pub tensors: BTreeMap<String, LoraPair>,
}

impl Adapter {
    /// Reads a PEFT adapter folder.
    ///
    /// # Errors
    /// As [`AdapterFile::open`], and [`Error::NonFinite`].
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let file = AdapterFile::open(dir)?;
        let tensors = file
            .modules()
            .map(|module| Ok((module.to_string(), file.read(module)?)))
            .collect::<Result<_>>()?;
        Ok(Self { config: file.config, tensors })
    }

    /// Publishes the adapter as a PEFT folder, complete or not at all.
    ///
    /// # Errors
    /// The folder exists, [`Error::Io`], [`Error::NonFinite`], and shapes that contradict the
    /// configuration.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        let folder = AtomicDir::create(dir.as_ref())?;
        self.write_as(folder.path(), dir.as_ref())?;
        let manifest = Manifest::of_dir(folder.path())?;
        Ok(folder.commit(&manifest)?)
    }

    /// Writes the adapter's two files into an existing folder that the caller publishes.
    ///
    /// # Errors
    /// As [`Adapter::save`].
    pub fn write_into(&self, dir: &Path) -> Result<()> {
        self.write_as(dir, dir)
    }

    fn write_as(&self, dir: &Path, target: &Path) -> Result<()> {
        let mut specs = Vec::new();
        for (module, pair) in &self.tensors {
            for (key, tensor) in [("lora_A", &pair.lora_a), ("lora_B", &pair.lora_b)] {
                specs.push(self.spec(target, factor_name(module, key), tensor)?);
            }
        }
        let mut writer = AdapterWriter::of_specs([dir, target], &self.config, specs)?;
        for (module, pair) in &self.tensors {
            writer.append(module, pair)?;
        }
        writer.finish()
    }

    fn spec(&self, dir: &Path, name: String, tensor: &Tensor) -> Result<TensorSpec> {
        let dtype = Dtype::of_kind(tensor.f_kind()?).ok_or_else(|| Error::Write {
            path: dir.join(WEIGHTS),
            message: format!("{name} is not f32, f16 or bf16"),
        })?;
        Ok(TensorSpec { name, dtype, shape: tensor.size() })
    }
}

/// Writes an adapter's two files a module at a time, for those who do not hold all of them at once.
#[derive(Debug)]
pub struct AdapterWriter {
    factors: SafetensorsWriter,
}

impl AdapterWriter {
    /// Begins the files in an existing folder that the caller publishes; the factors will be f32.
    /// `shapes` are modules in the order in which they will come, with the (out, in) features of each,
    /// as [`LoraConfig::modules`] gives them.
    ///
    /// # Errors
    /// [`Error::Io`], such as a full disk.
    pub fn create(dir: &Path, config: &LoraConfig, shapes: &[(String, [i64; 2])]) -> Result<Self> {
        let spec = |module: &str, key: &str, shape: [i64; 2]| TensorSpec {
            name: factor_name(module, key),
            dtype: Dtype::F32,
            shape: shape.to_vec(),
        };
        let pair = |(module, [out, inner]): &(String, [i64; 2])| {
            [spec(module, "lora_A", [config.r, *inner]), spec(module, "lora_B", [*out, config.r])]
        };
        Self::of_specs([dir, dir], config, shapes.iter().flat_map(pair).collect())
    }

    fn of_specs(
        [dir, target]: [&Path; 2],
        config: &LoraConfig,
        specs: Vec<TensorSpec>,
    ) -> Result<Self> {
        let path = target.join(CONFIG);
        let text = serde_json::to_string_pretty(&PeftConfig::of(config))
            .map_err(|source| Error::Json { path: path.clone(), source })?;
        fs::write(dir.join(CONFIG), text + "\n").map_err(Error::io(&path))?;
        Ok(Self { factors: SafetensorsWriter::create(dir, target, WEIGHTS, specs)? })
    }

    /// Writes the factors of the next module.
    ///
    /// # Errors
    /// [`Error::Write`] for another module or other shapes, [`Error::NonFinite`], [`Error::Io`].
    pub fn append(&mut self, module: &str, pair: &LoraPair) -> Result<()> {
        self.factors.append(&factor_name(module, "lora_A"), &pair.lora_a)?;
        self.factors.append(&factor_name(module, "lora_B"), &pair.lora_b)
    }

    /// Ends the files.
    ///
    /// # Errors
    /// [`Error::Write`] if a module is missing, [`Error::Io`].
    pub fn finish(self) -> Result<()> {
        self.factors.finish().map(drop)
    }
}

/// A factor's name in PEFT's file.
fn factor_name(module: &str, key: &str) -> String {
    format!("{PREFIX}{module}.{key}.weight")
}

/// An adapter folder whose files are checked, and whose factors are read one module at a time.
#[derive(Debug)]
pub struct AdapterFile {
    config: LoraConfig,
    file: TensorFile,
    modules: BTreeSet<String>,
}

impl AdapterFile {
    /// Opens a PEFT adapter folder.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for everything that LoRA on linear layers is not (`DoRA`, biases,
    /// ranks by pattern, saved modules), [`Error::Adapter`] for tensors that are not factors of a
    /// target module or that lack their partner.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let config = read_config(&dir.join(CONFIG))?;
        let path = dir.join(WEIGHTS);
        if !path.exists() && dir.join("adapter_model.bin").exists() {
            let message = format!("there is an adapter_model.bin (pickle), but no {WEIGHTS}");
            return Err(Error::Adapter { path: dir.to_path_buf(), message });
        }
        let file = TensorFile::open(&path)?;
        let modules = check_factors(&config, &file)?;
        Ok(Self { config, file, modules })
    }

    /// The adapter's settings.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The adapted modules, such as `model.layers.0.self_attn.q_proj`.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.modules.iter().map(String::as_str)
    }

    /// A hash that tells adapters apart without reading them: of the settings, the names and shapes, and
    /// the first numbers of every factor.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn fingerprint(&self) -> Result<String> {
        const FIRST_BYTES: usize = 4096;
        let mut hash = blake3::Hasher::new();
        hash.update(format!("{:?}", self.config).as_bytes());
        hash.update(self.file.header_hash().as_bytes());
        for entry in self.file.entries().values() {
            hash.update(&self.file.read_head(entry, FIRST_BYTES)?);
        }
        Ok(hash.finalize().to_hex().to_string())
    }

    /// Whether the adapter has factors for this module.
    pub fn has(&self, module: &str) -> bool {
        self.modules.contains(module)
    }

    /// Reads the factors of a module, in the data type that they are stored in.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], [`Error::NonFinite`], [`Error::Io`].
    pub fn read(&self, module: &str) -> Result<LoraPair> {
        let whole = |key| self.read_factor(module, key, &Shard::Replicated);
        Ok(LoraPair { lora_a: whole("lora_A")?, lora_b: whole("lora_B")? })
    }

    /// One rank's part of a module's factor, `lora_A` or `lora_B`, in the data type that it is stored in.
    ///
    /// # Errors
    /// As [`AdapterFile::read`], and [`Error::ShardMismatch`] for a factor of another shape.
    pub fn read_factor(&self, module: &str, factor: &str, shard: &Shard) -> Result<Tensor> {
        self.file.read_slice(&factor_name(module, factor), shard)
    }

    /// Checks that the adapter belongs to a model of this configuration: it has all target modules
    /// of all layers, nothing else, and factors of the right shapes.
    ///
    /// # Errors
    /// [`Error::AdapterShape`] with the shapes of both, [`Error::Adapter`] with the names of
    /// modules that only one of the two has.
    pub fn check_fits(&self, model: &LlamaConfig) -> Result<()> {
        let expected: BTreeMap<_, _> = self.config.modules(model)?.into_iter().collect();
        for module in &self.modules {
            let shape = |key: &str| {
                let name = factor_name(module, key);
                Ok::<_, Error>(self.file.entry(&name)?.shape.clone())
            };
            let (lora_a, lora_b) = (shape("lora_A")?, shape("lora_B")?);
            let Some([out, inner]) = expected.get(module).copied() else {
                let layers = model.num_hidden_layers;
                return Err(self.wrong(format!("{module} is not in the base of {layers} layers")));
            };
            if lora_a[1] != inner || lora_b[0] != out {
                let name = module.clone();
                return Err(Error::AdapterShape { name, lora_a, lora_b, base: vec![out, inner] });
            }
        }
        let missing: Vec<_> =
            expected.keys().filter(|module| !self.modules.contains(*module)).cloned().collect();
        match missing.first() {
            None => Ok(()),
            Some(first) => Err(self.wrong(format!(
                "no factors for {} of the base's target modules, such as {first}",
                missing.len()
            ))),
        }
    }

    fn wrong(&self, message: String) -> Error {
        Error::Adapter { path: self.file.path().to_path_buf(), message }
    }
}

/// Collects the modules, each with both factors of shapes (r, in) and (out, r).
fn check_factors(config: &LoraConfig, file: &TensorFile) -> Result<BTreeSet<String>> {
    let wrong = |message| Error::Adapter { path: file.path().to_path_buf(), message };
    let mut found: BTreeMap<String, [bool; 2]> = BTreeMap::new();
    for (key, entry) in file.entries() {
        let factor = key.strip_prefix(PREFIX).and_then(|name| {
            let a = name.strip_suffix(".lora_A.weight").map(|module| (module, 0));
            a.or_else(|| name.strip_suffix(".lora_B.weight").map(|module| (module, 1)))
        });
        let Some((module, number)) = factor else {
            return Err(wrong(format!("{key} is not a factor of a linear layer")));
        };
        let name = module.rsplit('.').next().unwrap_or(module);
        if !config.target_modules.contains(name) {
            return Err(wrong(format!("{key} is there, but {name} is no target module")));
        }
        let r_at = number;
        if entry.shape.len() != 2 || entry.shape[r_at] != config.r {
            let (r, shape) = (config.r, &entry.shape);
            return Err(wrong(format!("{key} has shape {shape:?}, but the adapter's r is {r}")));
        }
        if Dtype::of_safetensors(entry.dtype).is_none() {
            return Err(wrong(format!("{key} is {}, not F32, F16 or BF16", entry.dtype)));
        }
        found.entry(module.to_string()).or_default()[number] = true;
    }
    for (module, factors) in &found {
        for (there, key) in factors.iter().zip(["lora_A", "lora_B"]) {
            if !there {
                return Err(wrong(format!("{module} has no {key}")));
            }
        }
    }
    if found.is_empty() {
        return Err(wrong("it holds no factors".into()));
    }
    Ok(found.into_keys().collect())
}

fn read_config(path: &Path) -> Result<LoraConfig> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let peft: PeftConfig = serde_json::from_slice(&bytes)
        .map_err(|source| Error::Json { path: path.to_path_buf(), source })?;
    peft.resolve(path)
}

/// `adapter_config.json`: what we write, and what we must look at when we read.
#[derive(Debug, Serialize, Deserialize)]
struct PeftConfig {
    peft_type: String,
    #[serde(default)]
    task_type: Option<String>,
    #[serde(default)]
    base_model_name_or_path: Option<String>,
    r: i64,
    lora_alpha: serde_json::Number,
    #[serde(default)]
    lora_dropout: f64,
    target_modules: Value,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    bias: Option<String>,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    inference_mode: bool,
    #[serde(default)]
    modules_to_save: Option<Value>,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

impl PeftConfig {
    fn of(config: &LoraConfig) -> Self {
        // PEFT declares an integer; a whole number must not be written as 16.0.
        let alpha = config.lora_alpha;
        let lora_alpha = match alpha.fract() == 0.0 && alpha.abs() < 1e15 {
            true => serde_json::Number::from(alpha as i64),
            false => serde_json::Number::from_f64(alpha).unwrap_or_else(|| 0.into()),
        };
        Self {
            peft_type: "LORA".into(),
            task_type: Some("CAUSAL_LM".into()),
            base_model_name_or_path: config.base_model_name_or_path.clone(),
            r: config.r,
            lora_alpha,
            lora_dropout: config.lora_dropout,
            target_modules: config.target_modules.iter().cloned().collect(),
            use_rslora: config.use_rslora,
            bias: Some("none".into()),
            fan_in_fan_out: false,
            inference_mode: true,
            modules_to_save: None,
            rest: BTreeMap::new(),
        }
    }

    fn resolve(self, path: &Path) -> Result<LoraConfig> {
        self.refuse_other_methods(path)?;
        let wrong = |message| Error::Adapter { path: path.to_path_buf(), message };
        let target_modules = match &self.target_modules {
            Value::Array(names) => {
                names.iter().map(|name| name.as_str().map(String::from)).collect::<Option<_>>()
            }
            _ => None,
        };
        let target_modules: BTreeSet<String> =
            target_modules.ok_or_else(|| wrong("target_modules is not a list of names".into()))?;
        let lora_alpha = self.lora_alpha.as_f64().unwrap_or(f64::NAN);
        if self.r < 1 {
            return Err(wrong(format!("r is {}", self.r)));
        }
        if !lora_alpha.is_finite() {
            return Err(wrong(format!("lora_alpha is {}", self.lora_alpha)));
        }
        Ok(LoraConfig {
            r: self.r,
            lora_alpha,
            lora_dropout: self.lora_dropout,
            target_modules,
            use_rslora: self.use_rslora,
            base_model_name_or_path: self.base_model_name_or_path,
        })
    }

    /// Settings that change what the factors mean.
    fn refuse_other_methods(&self, path: &Path) -> Result<()> {
        let refuse = |key, value: String, supported| {
            Err(Error::Unsupported { path: PathBuf::from(path), key, value, supported })
        };
        if self.peft_type != "LORA" {
            return refuse("peft_type", self.peft_type.clone(), "LORA");
        }
        if let Some(bias) = self.bias.as_ref().filter(|bias| *bias != "none") {
            return refuse("bias", bias.clone(), "none");
        }
        if self.fan_in_fan_out {
            return refuse("fan_in_fan_out", "true".into(), "false");
        }
        if let Some(modules) = self.modules_to_save.as_ref().filter(|value| is_set(value)) {
            return refuse("modules_to_save", modules.to_string(), "none");
        }
        for key in OTHER_METHODS {
            if let Some(value) = self.rest.get(key).filter(|value| is_set(value)) {
                return refuse(key, value.to_string(), "unset");
            }
        }
        let init = self.rest.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default();
        if CHANGED_BASE.iter().any(|name| init.starts_with(name)) {
            return refuse("init_lora_weights", init.to_string(), "true, false, gaussian");
        }
        Ok(())
    }
}

/// Whether a setting is there and not empty.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Array(values) => !values.is_empty(),
        Value::Object(values) => !values.is_empty(),
        _ => true,
    }
}
