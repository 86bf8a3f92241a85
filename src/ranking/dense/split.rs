//! A graph taken apart by what its values depend on: the request alone, the item alone, or both.
//!
//! What depends on the request is computed once per request, what depends on the item once per item at load, and the rest for every
//! candidate. A product whose operand has columns of several kinds becomes a sum of one product for each, which is the same but for
//! the order of additions (binding-time analysis, as partial evaluators do it: Jones, Gomard and Sestoft 1993).

use std::collections::HashMap;
use std::sync::Arc;

use super::ops::{Graph, Id, Op};
use crate::candidates::Dependence;

/// The three parts. Each has one input: the columns of its class, in order of inputs and of columns therein.
#[derive(Clone, Debug)]
pub struct Split {
    /// Results: pieces that are the same for all candidates.
    pub request: Graph,
    /// Results: pieces of an item's row.
    pub item: Graph,
    /// Result: the model's.
    pub candidate: Graph,
}

/// A column of a value in one of the parts.
type Column = (Dependence, Id, u32);

struct Splitter<'a> {
    from: &'a Graph,
    parts: [Graph; 3],
    /// By value of the original.
    columns: HashMap<Id, Arc<Vec<Column>>>,
}

/// Takes a graph apart; `classes[i]` has the class of every column of the i-th input.
pub fn split(graph: &Graph, classes: &[Vec<Dependence>]) -> Split {
    let width = |class: Dependence| classes.iter().flatten().filter(|c| **c == class).count();
    let part = |class: Dependence| {
        let mut part = Graph::default();
        part.inputs.push(width(class));
        part.push(Op::Input(0));
        part
    };
    let mut splitter = Splitter { from: graph, parts: Dependence::ALL.map(part), columns: HashMap::new() };
    let mut next = [0u32; 3];
    let inputs: Vec<Vec<Column>> = classes
        .iter()
        .map(|classes| {
            let column = |&class: &Dependence| {
                next[class as usize] += 1;
                (class, 0, next[class as usize] - 1)
            };
            classes.iter().map(column).collect()
        })
        .collect();
    for at in graph.needed() {
        let columns = splitter.value(at, &inputs);
        splitter.columns.insert(at, Arc::new(columns));
    }
    let outputs: Vec<Id> = graph
        .outputs
        .iter()
        .map(|at| {
            let columns = splitter.columns[at].clone();
            splitter.realise(&columns, Dependence::Candidate)
        })
        .collect();
    let [request, item, mut candidate] = splitter.parts;
    candidate.outputs = outputs;
    Split { request, item, candidate }
}

impl Splitter<'_> {
    fn part(&mut self, class: Dependence) -> &mut Graph {
        &mut self.parts[class as usize]
    }

    /// The columns of a value, which is added to the part that its operands allow.
    fn value(&mut self, at: Id, inputs: &[Vec<Column>]) -> Vec<Column> {
        match self.from.op(at) {
            Op::Input(input) => inputs[*input].clone(),
            Op::Concat(parts) => parts.iter().flat_map(|part| self.columns[part].iter().copied()).collect(),
            Op::Take { x, columns } => columns.iter().map(|&c| self.columns[x][c as usize]).collect(),
            Op::Dense { x, weights, bias, base: None, repeat: 1 } => {
                let (columns, weights, bias) = (self.columns[x].clone(), weights.clone(), bias.clone());
                self.dense(&columns, &weights, &bias)
            }
            op => {
                let operands = op.operands();
                let all = || operands.iter().flat_map(|x| self.columns[x].iter());
                let class = all().next().map_or(Dependence::Request, |c| c.0);
                let class = if all().all(|c| c.0 == class) { class } else { Dependence::Candidate };
                let placed: HashMap<Id, Id> = operands
                    .iter()
                    .map(|&x| {
                        let columns = self.columns[&x].clone();
                        (x, self.realise(&columns, class))
                    })
                    .collect();
                let op = op.of(|x| placed[&x]);
                self.all_of(class, op)
            }
        }
    }

    /// Adds a value to a part and names its columns.
    fn all_of(&mut self, class: Dependence, op: Op) -> Vec<Column> {
        let part = self.part(class);
        let id = part.push(op);
        (0..part.width(id) as u32).map(|column| (class, id, column)).collect()
    }

    /// A product, in the one part that its operand is of, or as a sum over parts.
    fn dense(&mut self, columns: &[Column], weights: &[f32], bias: &Arc<Vec<f32>>) -> Vec<Column> {
        let n = bias.len();
        let of = |class: Dependence| {
            let mine = columns.iter().enumerate().filter(|(_, c)| c.0 == class);
            let (rows, columns): (Vec<usize>, Vec<Column>) = mine.map(|(row, &c)| (row, c)).unzip();
            let weights: Vec<f32> = rows.iter().flat_map(|row| &weights[row * n..(row + 1) * n]).copied().collect();
            (!columns.is_empty()).then_some((columns, weights))
        };
        let mut classes = Dependence::ALL.into_iter().filter_map(|class| Some((class, of(class)?))).collect::<Vec<_>>();
        let last = classes.pop();
        let Some((class, (own, weights))) = last else { return Vec::new() };
        if classes.is_empty() {
            let x = self.realise(&own, class);
            let op = Op::Dense { x, weights: Arc::new(weights), bias: bias.clone(), base: None, repeat: 1 };
            return self.all_of(class, op);
        }
        // The first part takes the bias.
        let mut bias = Some(bias.clone());
        let (mut item, mut shared) = (None, None);
        let mut add = |splitter: &mut Self, class: Dependence, own: &[Column], weights: Vec<f32>| {
            let x = splitter.realise(own, class);
            let bias = bias.take().unwrap_or_else(|| Arc::new(vec![0.0; n]));
            let op = Op::Dense { x, weights: Arc::new(weights), bias, base: None, repeat: 1 };
            let id = splitter.part(class).push(op);
            let given = splitter.give(class, id);
            match class {
                Dependence::Request => shared = Some(given),
                _ => item = Some(given),
            }
        };
        for (class, (own, weights)) in classes {
            add(self, class, &own, weights);
        }
        if class == Dependence::Item {
            add(self, class, &own, weights);
            return self.all_of(Dependence::Candidate, Op::Given { item, shared });
        }
        let x = self.realise(&own, Dependence::Candidate);
        let base = self.part(Dependence::Candidate).push(Op::Given { item, shared });
        let (weights, bias) = (Arc::new(weights), Arc::new(vec![0.0; n]));
        self.all_of(Dependence::Candidate, Op::Dense { x, weights, bias, base: Some(base), repeat: 1 })
    }

    /// The number of a value among what its part gives to candidates.
    fn give(&mut self, class: Dependence, id: Id) -> usize {
        let part = self.part(class);
        let width = part.width(id);
        if let Some(at) = part.outputs.iter().position(|&known| known == id) {
            return at;
        }
        part.outputs.push(id);
        let at = part.outputs.len() - 1;
        let candidate = self.part(Dependence::Candidate);
        match class {
            Dependence::Item => candidate.item_widths.push(width),
            _ => candidate.shared_widths.push(width),
        }
        at
    }

    /// A value in one part with these columns; those of other parts are brought over.
    fn realise(&mut self, columns: &[Column], to: Dependence) -> Id {
        let mut sources: Vec<(Dependence, Id)> = Vec::new();
        for &(class, id, _) in columns {
            if !sources.contains(&(class, id)) {
                sources.push((class, id));
            }
        }
        let (mut places, mut here, mut end) = (HashMap::new(), Vec::new(), 0u32);
        for (class, id) in sources {
            let mut wanted: Vec<u32> = columns.iter().filter(|c| (c.0, c.1) == (class, id)).map(|c| c.2).collect();
            if class == to {
                wanted = (0..self.part(class).width(id) as u32).collect();
            }
            wanted.sort_unstable();
            wanted.dedup();
            let taken = self.part(class).push(Op::Take { x: id, columns: Arc::new(wanted.clone()) });
            let local = match class {
                _ if class == to => taken,
                Dependence::Request => {
                    let shared = Some(self.give(class, taken));
                    self.part(to).push(Op::Given { item: None, shared })
                }
                _ => {
                    let item = Some(self.give(class, taken));
                    self.part(to).push(Op::Given { item, shared: None })
                }
            };
            for column in wanted {
                places.insert((class, id, column), end);
                end += 1;
            }
            here.push(local);
        }
        let x = self.part(to).push(Op::Concat(here));
        let columns = columns.iter().map(|column| places[column]).collect();
        self.part(to).push(Op::Take { x, columns: Arc::new(columns) })
    }
}
