//! The pickles in PyTorch's files, read by a machine that knows tensors and nothing else.
//!
//! A pickle is a program for a stack machine whose instructions may import and call whatever Python
//! has. This machine has the instructions that `torch.save` writes for a dictionary of tensors, and the
//! names in [`Global::of`]; all else is refused by name before anything is made of it. Nothing is
//! executed: a "call" makes a description of a tensor.
//! (Instructions: CPython's `Lib/pickletools.py`; calls: PyTorch's `torch/_utils.py`.)

use std::rc::Rc;

use safetensors::Dtype;

/// Values that one pickle may make. LLaMA-3.1-405B's need 40,000; a hostile one could make one out of
/// each of its bytes.
const MAX_VALUES: usize = 1 << 20;
/// Dimensions of a tensor.
const MAX_DIMS: usize = 8;

/// What a pickle can mention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    /// An integer of more than 64 bits, little-endian.
    Long(&'a [u8]),
    Float,
    Text(&'a str),
    Tuple(usize),
    List(usize),
    Dict(usize),
    Global(Global),
    Storage(usize),
    Tensor(usize),
}

/// The names that a pickle may import.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    /// `torch.HalfStorage` and the like.
    Storage(Dtype),
}

impl Global {
    fn of(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", "DoubleStorage") => Self::Storage(Dtype::F64),
            ("torch", "FloatStorage") => Self::Storage(Dtype::F32),
            ("torch", "HalfStorage") => Self::Storage(Dtype::F16),
            ("torch", "BFloat16Storage") => Self::Storage(Dtype::BF16),
            ("torch", "LongStorage") => Self::Storage(Dtype::I64),
            ("torch", "IntStorage") => Self::Storage(Dtype::I32),
            ("torch", "ShortStorage") => Self::Storage(Dtype::I16),
            ("torch", "CharStorage") => Self::Storage(Dtype::I8),
            ("torch", "ByteStorage") => Self::Storage(Dtype::U8),
            ("torch", "BoolStorage") => Self::Storage(Dtype::BOOL),
            _ => return None,
        })
    }
}

/// The elements that tensors look into.
#[derive(Debug, Clone, Copy)]
pub(super) struct Storage<'a> {
    pub(super) dtype: Dtype,
    /// Which of the file's storages it is.
    pub(super) key: &'a str,
    /// Elements.
    pub(super) len: u64,
}

/// A tensor as a view of a storage; offset and strides in elements.
#[derive(Debug, Clone)]
pub(super) struct View {
    pub(super) storage: usize,
    pub(super) offset: u64,
    pub(super) shape: Rc<[i64]>,
    pub(super) strides: Rc<[i64]>,
}

/// What one pickle made.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    root: Value<'a>,
    heap: Heap<'a>,
    /// Bytes of the program.
    pub(super) len: usize,
}

#[derive(Debug, Default)]
struct Heap<'a> {
    tuples: Vec<Vec<Value<'a>>>,
    lists: Vec<Vec<Value<'a>>>,
    dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    storages: Vec<Storage<'a>>,
    tensors: Vec<View>,
}

impl<'a> Pickle<'a> {
    /// Runs the pickle at the beginning of `bytes`.
    pub(super) fn run(bytes: &'a [u8]) -> Result<Self, String> {
        let mut machine = Machine { input: bytes, ..Machine::default() };
        let root = machine.run().map_err(|why| format!("{why}, at byte {}", machine.at))?;
        Ok(Self { root, len: machine.at, heap: machine.heap })
    }

    pub(super) fn root(&self) -> Value<'a> {
        self.root
    }

    /// The items of a list.
    pub(super) fn list(&self) -> Option<&[Value<'a>]> {
        match self.root {
            Value::List(list) => Some(&self.heap.lists[list]),
            _ => None,
        }
    }

    /// The items of a dictionary, in their order.
    pub(super) fn dict(&self) -> Option<&[(Value<'a>, Value<'a>)]> {
        match self.root {
            Value::Dict(dict) => Some(&self.heap.dicts[dict]),
            _ => None,
        }
    }

    pub(super) fn storages(&self) -> &[Storage<'a>] {
        &self.heap.storages
    }

    /// The tensors of a dictionary of tensors.
    pub(super) fn tensors(&self) -> Result<Vec<(&'a str, &View)>, String> {
        let items = self.dict().ok_or("it holds no dictionary of tensors")?;
        items
            .iter()
            .map(|item| match *item {
                (Value::Text(name), Value::Tensor(tensor)) => {
                    Ok((name, &self.heap.tensors[tensor]))
                }
                (Value::Text(name), _) => Err(format!("{name} is no tensor")),
                (key, _) => Err(format!("it has the key {key:?}, which is no text")),
            })
            .collect()
    }
}

#[derive(Debug, Default)]
struct Machine<'a> {
    input: &'a [u8],
    at: usize,
    stack: Vec<Value<'a>>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: Vec<Value<'a>>,
    heap: Heap<'a>,
    values: usize,
}

type Step<T = ()> = Result<T, String>;

impl<'a> Machine<'a> {
    fn run(&mut self) -> Step<Value<'a>> {
        loop {
            let opcode = self.byte()?;
            if opcode == b'.' {
                return match (self.stack.pop(), self.stack.is_empty()) {
                    (Some(root), true) => Ok(root),
                    _ => Err("it ends with another number of values than one".into()),
                };
            }
            self.step(opcode)?;
        }
    }

    fn step(&mut self, opcode: u8) -> Step {
        match opcode {
            0x80 => self.protocol(),
            0x95 => self.frame(),
            b'N' => self.push(Value::None),
            0x88 => self.push(Value::Bool(true)),
            0x89 => self.push(Value::Bool(false)),
            b'J' | b'K' | b'M' | 0x8a => self.integer(opcode),
            b'G' => {
                self.take(8)?;
                self.push(Value::Float)
            }
            0x8c | b'X' | 0x8d => self.text(opcode),
            b'}' => self.make_dict(),
            b']' => self.make_list(),
            b')' => self.make_tuple(Vec::new()),
            0x85..=0x87 => {
                let items = self.pop_many(usize::from(opcode - 0x84))?;
                self.make_tuple(items)
            }
            b't' => {
                let items = self.pop_to_mark()?;
                self.make_tuple(items)
            }
            b'(' => {
                self.count(1)?;
                self.marks.push(self.stack.len());
                Ok(())
            }
            b's' => {
                let item = self.pop_many(2)?;
                self.set_items(item)
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(items)
            }
            b'a' => {
                let item = self.pop_many(1)?;
                self.append(item)
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.append(items)
            }
            b'q' | b'r' | 0x94 => self.put(opcode),
            b'h' | b'j' => self.get(opcode),
            b'c' | 0x93 => self.import(opcode),
            b'Q' => self.storage(),
            b'R' => self.call(),
            b'b' => self.set_state(),
            _ => Err(format!("it has the instruction 0x{opcode:02x}, which tensors do not need")),
        }
    }

    // ---- input ----

    fn take(&mut self, len: usize) -> Step<&'a [u8]> {
        let rest = &self.input[self.at..];
        if rest.len() < len {
            return Err("it ends in the middle of an instruction".into());
        }
        self.at += len;
        Ok(&rest[..len])
    }

    fn byte(&mut self) -> Step<u8> {
        Ok(self.take(1)?[0])
    }

    /// An unsigned little-endian number of at most 8 bytes.
    fn number(&mut self, len: usize) -> Step<u64> {
        let mut bytes = [0; 8];
        bytes[..len].copy_from_slice(self.take(len)?);
        Ok(u64::from_le_bytes(bytes))
    }

    fn line(&mut self) -> Step<&'a str> {
        let rest = &self.input[self.at..];
        let len = rest.iter().position(|byte| *byte == b'\n').ok_or("a line without an end")?;
        let line = std::str::from_utf8(self.take(len)?).map_err(|_| "a name is not UTF-8")?;
        self.take(1)?;
        Ok(line)
    }

    // ---- stack ----

    /// Keeps what a hostile program can make us allocate small.
    fn count(&mut self, values: usize) -> Step {
        self.values += values;
        if self.values > MAX_VALUES {
            return Err(format!("it makes more than {MAX_VALUES} values"));
        }
        Ok(())
    }

    fn push(&mut self, value: Value<'a>) -> Step {
        self.count(1)?;
        self.stack.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Step<Value<'a>> {
        Ok(self.pop_many(1)?[0])
    }

    /// The last `count` values, the last one last; those below a mark are out of reach.
    fn pop_many(&mut self, count: usize) -> Step<Vec<Value<'a>>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len().checked_sub(count) {
            Some(at) if at >= floor => Ok(self.stack.split_off(at)),
            _ => Err("it takes a value from an empty stack".into()),
        }
    }

    fn pop_to_mark(&mut self) -> Step<Vec<Value<'a>>> {
        let at = self.marks.pop().ok_or("a mark is missing")?;
        Ok(self.stack.split_off(at))
    }

    fn top(&self) -> Step<Value<'a>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack[floor..].last().copied().ok_or_else(|| "the stack is empty".into())
    }

    // ---- instructions ----

    fn protocol(&mut self) -> Step {
        match self.byte()? {
            2..=5 => Ok(()),
            other => Err(format!("its protocol is {other}, not 2 to 5")),
        }
    }

    /// A frame announces how many bytes may be read ahead; there is nothing to do.
    fn frame(&mut self) -> Step {
        let len = self.number(8)?;
        match len <= (self.input.len() - self.at) as u64 {
            true => Ok(()),
            false => Err(format!("a frame of {len} bytes is longer than the file")),
        }
    }

    fn integer(&mut self, opcode: u8) -> Step {
        let value = match opcode {
            b'J' => Value::Int(i64::from(self.number(4)? as u32 as i32)),
            b'K' => Value::Int(self.number(1)? as i64),
            b'M' => Value::Int(self.number(2)? as i64),
            _ => {
                let len = usize::from(self.byte()?);
                match self.take(len)? {
                    [] => Value::Int(0),
                    bytes if len <= 8 => Value::Int(signed(bytes)),
                    bytes => Value::Long(bytes),
                }
            }
        };
        self.push(value)
    }

    fn text(&mut self, opcode: u8) -> Step {
        let len = match opcode {
            0x8c => self.number(1)?,
            b'X' => self.number(4)?,
            _ => self.number(8)?,
        };
        let len = usize::try_from(len).map_err(|_| format!("a text of {len} bytes"))?;
        let text = std::str::from_utf8(self.take(len)?).map_err(|_| "a text is not UTF-8")?;
        self.push(Value::Text(text))
    }

    fn make_dict(&mut self) -> Step {
        self.heap.dicts.push(Vec::new());
        self.push(Value::Dict(self.heap.dicts.len() - 1))
    }

    fn make_list(&mut self) -> Step {
        self.heap.lists.push(Vec::new());
        self.push(Value::List(self.heap.lists.len() - 1))
    }

    fn make_tuple(&mut self, items: Vec<Value<'a>>) -> Step {
        self.heap.tuples.push(items);
        self.push(Value::Tuple(self.heap.tuples.len() - 1))
    }

    fn set_items(&mut self, items: Vec<Value<'a>>) -> Step {
        let Value::Dict(dict) = self.top()? else { return Err("items for no dictionary".into()) };
        let (pairs, []) = items.as_chunks::<2>() else {
            return Err("a key without a value".into());
        };
        self.count(pairs.len())?;
        self.heap.dicts[dict].extend(pairs.iter().map(|[key, value]| (*key, *value)));
        Ok(())
    }

    fn append(&mut self, items: Vec<Value<'a>>) -> Step {
        let Value::List(list) = self.top()? else { return Err("items for no list".into()) };
        self.count(items.len())?;
        self.heap.lists[list].extend(items);
        Ok(())
    }

    /// Numbers are given in turn by every writer, so that none can ask for a large table.
    fn put(&mut self, opcode: u8) -> Step {
        let index = match opcode {
            b'q' => self.number(1)? as usize,
            b'r' => self.number(4)? as usize,
            _ => self.memo.len(),
        };
        let value = self.top()?;
        self.count(1)?;
        let next = self.memo.len();
        match self.memo.get_mut(index) {
            Some(place) => *place = value,
            None if index == next => self.memo.push(value),
            None => return Err(format!("it remembers number {index} out of turn")),
        }
        Ok(())
    }

    fn get(&mut self, opcode: u8) -> Step {
        let index = self.number(if opcode == b'h' { 1 } else { 4 })? as usize;
        match self.memo.get(index) {
            Some(value) => self.push(*value),
            None => Err(format!("it asks for number {index}, which it has not remembered")),
        }
    }

    fn import(&mut self, opcode: u8) -> Step {
        let (module, name) = match opcode {
            b'c' => (self.line()?, self.line()?),
            _ => match self.pop_many(2)?[..] {
                [Value::Text(module), Value::Text(name)] => (module, name),
                _ => return Err("an import of something without a name".into()),
            },
        };
        match Global::of(module, name) {
            Some(global) => self.push(Value::Global(global)),
            None => Err(format!("it wants to use {}", shown(module, name))),
        }
    }

    /// `("storage", type, key, location, length)`, and for old files a view of it, always `None`.
    fn storage(&mut self) -> Step {
        let Value::Tuple(tuple) = self.pop()? else { return Err("a storage of no form".into()) };
        let (key, dtype, len) = match self.heap.tuples[tuple][..] {
            [
                Value::Text("storage"),
                Value::Global(Global::Storage(dtype)),
                Value::Text(key),
                Value::Text(_),
                Value::Int(len),
                ref view @ ..,
            ] if matches!(view, [] | [Value::None]) => (key, dtype, len),
            _ => return Err("a storage of no known form".into()),
        };
        let len = u64::try_from(len).map_err(|_| format!("a storage of {len} elements"))?;
        self.heap.storages.push(Storage { dtype, key, len });
        self.push(Value::Storage(self.heap.storages.len() - 1))
    }

    fn call(&mut self) -> Step {
        let (Value::Tuple(arguments), Value::Global(global)) = (self.pop()?, self.pop()?) else {
            return Err("a call of no known form".into());
        };
        let arguments = std::mem::take(&mut self.heap.tuples[arguments]);
        match (global, &arguments[..]) {
            (Global::OrderedDict, []) => self.make_dict(),
            // What is optional at the end says how the tensor is to be used in Python.
            (
                Global::RebuildTensor,
                [
                    Value::Storage(storage),
                    Value::Int(offset),
                    Value::Tuple(shape),
                    Value::Tuple(strides),
                    Value::Bool(_),
                    Value::Dict(_),
                    ..,
                ],
            ) => self.view(*storage, *offset, *shape, *strides),
            (
                Global::RebuildParameter,
                [tensor @ Value::Tensor(_), Value::Bool(_), Value::Dict(_)],
            ) => self.push(*tensor),
            _ => Err(format!("a call of {global:?} with other arguments than torch.save gives")),
        }
    }

    fn view(&mut self, storage: usize, offset: i64, shape: usize, strides: usize) -> Step {
        let offset = u64::try_from(offset).map_err(|_| format!("a tensor from {offset} on"))?;
        let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
        if shape.len() != strides.len() {
            return Err(format!("a tensor of shape {shape:?} with strides {strides:?}"));
        }
        self.heap.tensors.push(View { storage, offset, shape, strides });
        self.push(Value::Tensor(self.heap.tensors.len() - 1))
    }

    fn sizes(&self, tuple: usize) -> Step<Rc<[i64]>> {
        let items = &self.heap.tuples[tuple];
        if items.len() > MAX_DIMS {
            return Err(format!("a tensor of {} dimensions", items.len()));
        }
        items
            .iter()
            .map(|item| match item {
                Value::Int(size) if *size >= 0 => Ok(*size),
                other => Err(format!("a dimension of {other:?}")),
            })
            .collect()
    }

    /// Attributes of a dictionary (`_metadata` of a state dictionary), which hold nothing of tensors.
    fn set_state(&mut self) -> Step {
        self.pop()?;
        match self.top()? {
            Value::Dict(_) => Ok(()),
            _ => Err("it sets the state of something that is no dictionary".into()),
        }
    }
}

/// A two's complement number of 1 to 8 bytes.
fn signed(bytes: &[u8]) -> i64 {
    let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
    let mut all = [if negative { 0xff } else { 0 }; 8];
    all[..bytes.len()].copy_from_slice(bytes);
    i64::from_le_bytes(all)
}

/// A foreign name, cut to a length that a message can have.
fn shown(module: &str, name: &str) -> String {
    const SHOWN: usize = 100;
    format!("{module}.{name}").chars().take(SHOWN).flat_map(char::escape_default).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_as_pickletools_shows_them() {
        // pickle.dumps({"a": [1, -2, 300, 70000, 2**40, None, True]}, 2)
        let bytes =
            b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01]q\x02(K\x01J\xfe\xff\xff\xffM,\x01Jp\x11\
            \x01\x00\x8a\x06\x00\x00\x00\x00\x00\x01N\x88es.rest";
        let pickle = Pickle::run(bytes).unwrap();
        assert_eq!(&bytes[pickle.len..], b"rest");
        assert_eq!(pickle.dict().unwrap(), [(Value::Text("a"), Value::List(0))]);
        let ints = [1, -2, 300, 70_000, 1 << 40].map(Value::Int);
        assert_eq!(pickle.heap.lists[0], [&ints[..], &[Value::None, Value::Bool(true)]].concat());
    }

    #[test]
    fn what_tensors_do_not_need_is_refused_by_name() {
        for (bytes, expected) in [
            (&b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R."[..], "os.system"),
            (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "builtins.eval"),
            (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "RebuildTensor"),
            (b"\x80\x02ccollections\nOrderedDict\nN\x85R.", "OrderedDict"),
            (b"\x80\x02iposix\nsystem\n.", "instruction 0x69"),
            (b"\x80\x02h\x07.", "number 7"),
            (b"\x80\x02Nr\xff\xff\xff\x7f.", "out of turn"),
            (b"\x80\x02X\xff\xff\xff\xff.", "middle of an instruction"),
            (b"\x80\x05\x8d\xff\xff\xff\xff\xff\xff\xff\xff.", "middle of an instruction"),
            (b"\x80\x02(K\x01(R.", "empty stack"),
            (b"\x80\x02NN.", "another number of values"),
            (b"\x80\x09N.", "protocol is 9"),
            (b"", "middle of an instruction"),
        ] {
            let error = Pickle::run(bytes).unwrap_err();
            assert!(error.contains(expected), "{error}, expected {expected}");
        }
    }

    #[test]
    fn memory_is_bounded_whatever_the_program() {
        for opcode in [b'}', b']', b')', b'(', b'N'] {
            let bytes = vec![opcode; 4 << 20];
            let error = Pickle::run(&bytes).unwrap_err();
            assert!(error.contains("values"), "{error}");
        }
    }
}
