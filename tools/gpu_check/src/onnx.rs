//! ONNX files of perceptrons, for catalogues that are made up: the few messages of onnx.proto that take one, written by hand:
//! rten-onnx, which could write them, leaves out the name of a graph, without which ONNX's checker takes none.

use rand::Rng as _;
use rand::SeedableRng as _;
use rand::rngs::SmallRng;

/// `TensorProto.DataType`
const FLOAT: u64 = 1;
const INT64: u64 = 7;
/// `AttributeProto.AttributeType`
const INT: u64 = 2;

/// A protobuf message that grows.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn number(mut self, field: u64, value: u64) -> Self {
        self.varint(field << 3);
        self.varint(value);
        self
    }

    fn bytes(mut self, field: u64, value: &[u8]) -> Self {
        self.varint(field << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    fn text(self, field: u64, value: &str) -> Self {
        self.bytes(field, value.as_bytes())
    }

    fn message(self, field: u64, value: Message) -> Self {
        self.bytes(field, &value.0)
    }
}

fn node(kind: &str, inputs: &[&str], output: &str) -> Message {
    let node = inputs.iter().fold(Message::default(), |node, input| node.text(1, input));
    node.text(2, output).text(4, kind)
}

fn tensor(name: &str, kind: u64, dims: &[usize], data: &[u8]) -> Message {
    let tensor = dims.iter().fold(Message::default(), |tensor, &dim| tensor.number(1, dim as u64));
    tensor.number(2, kind).text(8, name).bytes(9, data)
}

/// `[n, width]` floats.
fn value(name: &str, width: usize) -> Message {
    let dims = [Message::default().text(2, "n"), Message::default().number(1, width as u64)];
    let shape = dims.into_iter().fold(Message::default(), |shape, dim| shape.message(1, dim));
    let of = Message::default().number(1, FLOAT).message(2, shape);
    Message::default().text(1, name).message(2, Message::default().message(1, of))
}

/// A perceptron with ReLUs and random weights (He et al. 2015) over the columns `picked` of its input `features`, `[n, width]`, whose output
/// is `score`, `[n, 1]`. `layers`: widths of the hidden ones.
pub fn perceptron(width: usize, picked: &[i64], layers: &[usize], seed: u64) -> Vec<u8> {
    let random = &mut SmallRng::seed_from_u64(seed);
    let indices: Vec<u8> = picked.iter().flat_map(|column| column.to_le_bytes()).collect();
    let axis = Message::default().text(1, "axis").number(3, 1).number(20, INT);
    let mut graph = Message::default()
        .message(1, node("Gather", &["features", "picked"], "x0").message(5, axis))
        .text(2, "perceptron")
        .message(5, tensor("picked", INT64, &[picked.len()], &indices));
    let mut n_inputs = picked.len();
    for (at, &n) in layers.iter().chain([&1]).enumerate() {
        let size = (2.0 / n_inputs as f32).sqrt() * 3f32.sqrt();
        let mut floats = |n: usize, size: f32| -> Vec<u8> {
            (0..n).flat_map(|_| random.random_range(-size..size).to_le_bytes()).collect()
        };
        let [weights, bias, sums, next] = ["w", "b", "s", "x"].map(|name| format!("{name}{}", at + 1));
        let is_last = at == layers.len();
        let sums = if is_last { "score" } else { &sums };
        graph = graph
            .message(1, node("Gemm", &[&format!("x{at}"), &weights, &bias], sums))
            .message(5, tensor(&weights, FLOAT, &[n_inputs, n], &floats(n_inputs * n, size)))
            .message(5, tensor(&bias, FLOAT, &[n], &floats(n, 0.1)));
        if !is_last {
            graph = graph.message(1, node("Relu", &[sums], &next));
        }
        n_inputs = n;
    }
    let graph = graph.message(11, value("features", width)).message(12, value("score", 1));
    let opset = Message::default().text(1, "").number(2, 17);
    Message::default().number(1, 8).message(7, graph).message(8, opset).0
}
