//! A reader of pickles that can build dictionaries, numbers, texts and tensors, and nothing else.
//!
//! A pickle is a program for a stack machine that may call any function of Python. Of its instructions this machine has
//! those that PyTorch writes for a `state_dict` (protocol 2), and of functions only the [`Global`]s: any other is refused by
//! its name, and so is any other instruction. Nothing is ever executed, expanded or copied: containers are numbers of nodes
//! in one list, so what a pickle can cost is bounded by its length.

use std::collections::HashMap;

/// What may be named by a pickle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Kind),
}

/// The type of a storage's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    F64,
    F32,
    F16,
    Bf16,
    /// Numbers that weights are not made of, of this size.
    Other(usize),
}

impl Kind {
    pub(super) fn bytes(self) -> usize {
        match self {
            Kind::F64 => 8,
            Kind::F32 => 4,
            Kind::F16 | Kind::Bf16 => 2,
            Kind::Other(n) => n,
        }
    }
}

const GLOBALS: &[(&str, &str, Global)] = &[
    ("collections", "OrderedDict", Global::OrderedDict),
    ("torch._utils", "_rebuild_tensor_v2", Global::RebuildTensor),
    ("torch._utils", "_rebuild_parameter", Global::RebuildParameter),
    ("torch", "DoubleStorage", Global::Storage(Kind::F64)),
    ("torch", "FloatStorage", Global::Storage(Kind::F32)),
    ("torch", "HalfStorage", Global::Storage(Kind::F16)),
    ("torch", "BFloat16Storage", Global::Storage(Kind::Bf16)),
    ("torch", "LongStorage", Global::Storage(Kind::Other(8))),
    ("torch", "IntStorage", Global::Storage(Kind::Other(4))),
    ("torch", "ShortStorage", Global::Storage(Kind::Other(2))),
    ("torch", "CharStorage", Global::Storage(Kind::Other(1))),
    ("torch", "ByteStorage", Global::Storage(Kind::Other(1))),
    ("torch", "BoolStorage", Global::Storage(Kind::Other(1))),
];

/// A value, or where it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float,
    /// Of texts, tuples, dictionaries, storages and tensors the node.
    Node(usize),
    Global(Global),
}

/// What a value with contents is.
#[derive(Clone, Debug)]
pub(super) enum Node {
    Text(String),
    Tuple(Vec<Value>),
    List(Vec<Value>),
    Dict(Vec<(Value, Value)>),
    Storage(Storage),
    Tensor(View),
}

/// A storage that stands beside the pickle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Storage {
    pub(super) kind: Kind,
    pub(super) key: String,
    /// Elements that the pickle claims.
    pub(super) len: usize,
}

/// A tensor as a view of a storage. The elements that it reaches are within the claimed ones, and no more than those.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub(super) storage: Storage,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

/// What a pickle holds.
#[derive(Debug)]
pub(super) struct Pickle {
    pub(super) nodes: Vec<Node>,
    pub(super) root: Value,
    /// Where it ends.
    pub(super) end: usize,
}

type Result<T> = std::result::Result<T, String>;

/// Reads the pickle that `bytes` begins with.
pub(super) fn read(bytes: &[u8]) -> Result<Pickle> {
    let mut machine =
        Machine { bytes, at: 0, stack: Vec::new(), marks: Vec::new(), memo: HashMap::new(), nodes: Vec::new() };
    let root = machine.run().map_err(|e| format!("{e} (byte {} of the pickle)", machine.at))?;
    Ok(Pickle { nodes: machine.nodes, root, end: machine.at })
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    nodes: Vec<Node>,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<Value> {
        loop {
            let [op] = self.take::<1>()?;
            match op {
                b'.' => {
                    let root = self.pop()?;
                    return match self.stack.is_empty() && self.marks.is_empty() {
                        true => Ok(root),
                        false => Err("it ends with values left over".into()),
                    };
                }
                0x80 => match self.take::<1>()? {
                    [2..=4] => {}
                    [n] => return Err(format!("protocol {n} is not what PyTorch writes")),
                },
                b'(' => self.marks.push(self.stack.len()),
                b'N' => self.stack.push(Value::None),
                0x88 => self.stack.push(Value::Bool(true)),
                0x89 => self.stack.push(Value::Bool(false)),
                b'K' => {
                    let [n] = self.take::<1>()?;
                    self.stack.push(Value::Int(n.into()));
                }
                b'M' => {
                    let n = u16::from_le_bytes(self.take()?);
                    self.stack.push(Value::Int(n.into()));
                }
                b'J' => {
                    let n = i32::from_le_bytes(self.take()?);
                    self.stack.push(Value::Int(n.into()));
                }
                0x8a => {
                    let n = self.long()?;
                    self.stack.push(Value::Int(n));
                }
                b'G' => {
                    self.take::<8>()?;
                    self.stack.push(Value::Float);
                }
                b'X' => {
                    let n = u32::from_le_bytes(self.take()?);
                    self.text(n as usize)?;
                }
                b'T' => {
                    let n = u32::from_le_bytes(self.take()?);
                    self.text(n as usize)?;
                }
                b'U' => {
                    let [n] = self.take::<1>()?;
                    self.text(n.into())?;
                }
                b')' => self.node(Node::Tuple(Vec::new())),
                b']' => self.node(Node::List(Vec::new())),
                b'}' => self.node(Node::Dict(Vec::new())),
                0x85..=0x87 => {
                    let from = self.floor()?;
                    let n = usize::from(op - 0x84);
                    let items = match self.stack.len().checked_sub(n).filter(|start| *start >= from) {
                        Some(start) => self.stack.split_off(start),
                        None => return Err(SHORT.into()),
                    };
                    self.node(Node::Tuple(items));
                }
                b't' => {
                    let items = self.since_mark()?;
                    self.node(Node::Tuple(items));
                }
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' => {
                    let items = self.since_mark()?;
                    self.append(items)?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.insert(vec![key, value])?;
                }
                b'u' => {
                    let items = self.since_mark()?;
                    self.insert(items)?;
                }
                b'q' => {
                    let [n] = self.take::<1>()?;
                    self.remember(n.into())?;
                }
                b'r' => {
                    let n = u32::from_le_bytes(self.take()?);
                    self.remember(n)?;
                }
                b'h' => {
                    let [n] = self.take::<1>()?;
                    self.recall(n.into())?;
                }
                b'j' => {
                    let n = u32::from_le_bytes(self.take()?);
                    self.recall(n)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    let known = GLOBALS.iter().find(|(m, n, _)| (*m, *n) == (module.as_str(), name.as_str()));
                    let Some((_, _, global)) = known else {
                        return Err(format!(
                            "it asks for {module}.{name}, which is no part of a tensor; what it would do is not done"
                        ));
                    };
                    self.stack.push(Value::Global(*global));
                }
                b'Q' => self.persistent()?,
                b'R' => self.reduce()?,
                b'b' => {
                    // Attributes of an OrderedDict: PyTorch keeps the versions of modules there.
                    let (state, object) = (self.pop()?, self.top()?);
                    match (self.of(state), self.of(object)) {
                        (Some(Node::Dict(_)), Some(Node::Dict(_))) => {}
                        _ => return Err("it gives attributes to what is no dictionary".into()),
                    }
                }
                op => {
                    return Err(format!(
                        "it has the instruction {:?} (0x{op:02x}), which no tensor needs",
                        char::from(op)
                    ));
                }
            }
        }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let bytes = self.bytes[self.at..].first_chunk::<N>().ok_or(ENDS)?;
        self.at += N;
        Ok(*bytes)
    }

    fn slice(&mut self, n: usize) -> Result<&[u8]> {
        let bytes = self.bytes[self.at..].get(..n).ok_or(ENDS)?;
        self.at += n;
        Ok(bytes)
    }

    /// A number of up to eight bytes.
    fn long(&mut self) -> Result<i64> {
        let [n] = self.take::<1>()?;
        let bytes = self.slice(n.into())?;
        if bytes.len() > 8 {
            return Err(format!("it has a number of {n} bytes, which is no size of a tensor"));
        }
        let negative = bytes.last().is_some_and(|b| *b >= 0x80);
        let mut all = [if negative { 0xff } else { 0 }; 8];
        all[..bytes.len()].copy_from_slice(bytes);
        Ok(i64::from_le_bytes(all))
    }

    fn line(&mut self) -> Result<String> {
        let rest = &self.bytes[self.at..];
        let n = rest.iter().take(MOST_NAME).position(|b| *b == b'\n').ok_or("it names something without an end")?;
        let line = std::str::from_utf8(&rest[..n]).map_err(|_| "it names something that is no text")?.to_owned();
        self.at += n + 1;
        Ok(line)
    }

    fn text(&mut self, n: usize) -> Result<()> {
        let text = std::str::from_utf8(self.slice(n)?).map_err(|_| "it holds a text that is not UTF-8")?.to_owned();
        self.node(Node::Text(text));
        Ok(())
    }

    fn node(&mut self, node: Node) {
        self.stack.push(Value::Node(self.nodes.len()));
        self.nodes.push(node);
    }

    /// Height that the stack must not fall below.
    fn floor(&self) -> Result<usize> {
        Ok(self.marks.last().copied().unwrap_or(0))
    }

    fn pop(&mut self) -> Result<Value> {
        match self.stack.len() > self.floor()? {
            true => self.stack.pop().ok_or(SHORT.into()),
            false => Err(SHORT.into()),
        }
    }

    fn top(&self) -> Result<Value> {
        let top = self.stack.last().filter(|_| self.floor().is_ok_and(|floor| self.stack.len() > floor));
        top.copied().ok_or(SHORT.into())
    }

    fn since_mark(&mut self) -> Result<Vec<Value>> {
        let from = self.marks.pop().ok_or("it closes what it never opened")?;
        Ok(self.stack.split_off(from))
    }

    fn of(&self, value: Value) -> Option<&Node> {
        match value {
            Value::Node(n) => self.nodes.get(n),
            _ => None,
        }
    }

    fn append(&mut self, items: Vec<Value>) -> Result<()> {
        match self.top()? {
            Value::Node(n) => match &mut self.nodes[n] {
                Node::List(list) => list.extend(items),
                _ => return Err("it appends to what is no list".into()),
            },
            _ => return Err("it appends to what is no list".into()),
        }
        Ok(())
    }

    fn insert(&mut self, items: Vec<Value>) -> Result<()> {
        let Value::Node(n) = self.top()? else { return Err("it sets keys of what is no dictionary".into()) };
        let Node::Dict(dict) = &mut self.nodes[n] else { return Err("it sets keys of what is no dictionary".into()) };
        let (pairs, []) = items.as_chunks::<2>() else { return Err("it sets a key without a value".into()) };
        dict.extend(pairs.iter().map(|[key, value]| (*key, *value)));
        Ok(())
    }

    fn remember(&mut self, n: u32) -> Result<()> {
        let top = self.top()?;
        self.memo.insert(n, top);
        Ok(())
    }

    fn recall(&mut self, n: u32) -> Result<()> {
        let value = self.memo.get(&n).ok_or_else(|| format!("it recalls a value {n} that it never kept"))?;
        self.stack.push(*value);
        Ok(())
    }

    /// `('storage', type, key, device, elements)`: what stands beside the pickle.
    fn persistent(&mut self) -> Result<()> {
        const OTHER: &str = "it refers to something beside it that is no storage";
        let id = self.pop()?;
        let Some(Node::Tuple(parts)) = self.of(id) else { return Err(OTHER.into()) };
        // Files of PyTorch before 1.6 have one more, which is None.
        let (&[word, Value::Global(Global::Storage(kind)), key, _, Value::Int(len)]
        | &[word, Value::Global(Global::Storage(kind)), key, _, Value::Int(len), Value::None]) = parts.as_slice()
        else {
            return Err(OTHER.into());
        };
        let (Some(Node::Text(word)), Some(Node::Text(key))) = (self.of(word), self.of(key)) else {
            return Err(OTHER.into());
        };
        if word != "storage" {
            return Err(OTHER.into());
        }
        // Numbers, in PyTorch's files; each view has its own.
        if key.len() > LONGEST_KEY {
            return Err(format!("a storage with a name of {} bytes", key.len()));
        }
        let len = usize::try_from(len).map_err(|_| format!("a storage of {len} elements"))?;
        let storage = Storage { kind, key: key.clone(), len };
        self.node(Node::Storage(storage));
        Ok(())
    }

    fn reduce(&mut self) -> Result<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Some(Node::Tuple(arguments)) = self.of(arguments) else {
            return Err("it calls something without a tuple of arguments".into());
        };
        match function {
            Value::Global(Global::OrderedDict) if arguments.is_empty() => self.node(Node::Dict(Vec::new())),
            Value::Global(Global::RebuildTensor) => {
                let view = self.view(arguments)?;
                self.node(Node::Tensor(view));
            }
            Value::Global(Global::RebuildParameter) => match arguments.first() {
                Some(tensor) if matches!(self.of(*tensor), Some(Node::Tensor(_))) => self.stack.push(*tensor),
                _ => return Err("it makes a parameter of what is no tensor".into()),
            },
            _ => return Err("it calls what is no function of tensors, or with strange arguments".into()),
        }
        Ok(())
    }

    /// `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`.
    fn view(&self, arguments: &[Value]) -> Result<View> {
        const STRANGE: &str = "it makes a tensor of strange arguments";
        let [storage, Value::Int(offset), size, stride, ..] = arguments else { return Err(STRANGE.into()) };
        let Some(Node::Storage(storage)) = self.of(*storage) else { return Err(STRANGE.into()) };
        let sizes = |value: Value| -> Result<Vec<usize>> {
            let Some(Node::Tuple(list)) = self.of(value) else { return Err(STRANGE.into()) };
            let size = |v: &Value| match v {
                Value::Int(n) => usize::try_from(*n).map_err(|_| format!("a tensor with a size or stride of {n}")),
                _ => Err(STRANGE.into()),
            };
            list.iter().map(size).collect()
        };
        let (shape, strides) = (sizes(*size)?, sizes(*stride)?);
        let offset = usize::try_from(*offset).map_err(|_| format!("a tensor at offset {offset}"))?;
        if shape.len() != strides.len() || shape.len() > MOST_DIMENSIONS {
            return Err(format!("a tensor of {} dimensions with {} strides", shape.len(), strides.len()));
        }
        let count = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        let last = shape
            .iter()
            .zip(&strides)
            .try_fold(offset, |at, (d, s)| at.checked_add(d.saturating_sub(1).checked_mul(*s)?));
        let empty = count == Some(0);
        match (count, last) {
            // A view that repeats elements could be of any size.
            (Some(count), Some(last)) if count <= storage.len && (empty || last < storage.len) => {}
            _ => {
                return Err(format!(
                    "a tensor of shape {shape:?} (strides {strides:?}, offset {offset}) does not lie within its storage of {} \
                     elements",
                    storage.len
                ));
            }
        }
        Ok(View { storage: storage.clone(), offset, shape, strides })
    }
}

const ENDS: &str = "it ends in the middle of an instruction";
const SHORT: &str = "it takes more values than there are";
const LONGEST_KEY: usize = 64;
/// Bytes of a name of Python's.
const MOST_NAME: usize = 256;
const MOST_DIMENSIONS: usize = 8;
