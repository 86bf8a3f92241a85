//! `score = "0.7 * click + 0.3 * purchase"`: several outputs of a model made one score.

use std::sync::Arc;

use super::dense::ops::{Binary, Graph, Id, Op, Unary};

/// Nested parentheses and signs beyond this are refused.
const MOST_DEPTH: usize = 32;

/// Numbers and names combined by `+ - * /`, parentheses, and `exp`, `log`, `sqrt`, `sigmoid`, `tanh` of one part and `pow`, `max`,
/// `min` of two.
#[derive(Clone, Debug, PartialEq)]
pub enum Expression {
    /// As written.
    Number(f32),
    /// The value of an output, by its place in the list of names.
    Output(usize),
    /// Of one part.
    Unary(Unary, Box<Expression>),
    /// Of two parts.
    Binary(Binary, Box<Expression>, Box<Expression>),
}

impl Expression {
    /// Parses `text`; the names that it uses come in the order of their first use.
    ///
    /// # Errors
    /// What is wrong and at which character, from 1.
    pub fn parse(text: &str) -> Result<(Self, Vec<String>), String> {
        let mut parser = Parser { text, at: 0, names: Vec::new(), depth: 0 };
        let expression = parser.sum()?;
        match parser.peek() {
            None if parser.names.is_empty() => Err("names no output".to_owned()),
            None => Ok((expression, parser.names)),
            Some(other) => Err(parser.wrong(&format!("`{other}` where the expression should end"))),
        }
    }

    /// The value for one row.
    pub fn value(&self, outputs: &impl Fn(usize) -> f32) -> f32 {
        match self {
            Expression::Number(value) => *value,
            Expression::Output(at) => outputs(*at),
            Expression::Unary(unary, x) => {
                let x = x.value(outputs);
                match unary {
                    Unary::Exp => x.exp(),
                    Unary::Log => x.ln(),
                    Unary::Sqrt => x.sqrt(),
                    Unary::Tanh => x.tanh(),
                    _ => 1.0 / (1.0 + (-x).exp()),
                }
            }
            Expression::Binary(binary, a, b) => binary.of(a.value(outputs), b.value(outputs)),
        }
    }

    /// Adds the same computation to a graph whose outputs, by number, are values of one column.
    pub fn add_to(&self, graph: &mut Graph, outputs: &[Id]) -> Id {
        match self {
            // A column that is the same for all rows, made of any other.
            Expression::Number(value) => {
                let (gain, add) = (Arc::new(vec![0.0]), Arc::new(vec![*value]));
                graph.push(Op::Affine { x: outputs[0], gain, add })
            }
            Expression::Output(at) => outputs[*at],
            Expression::Unary(unary, x) => {
                let x = x.add_to(graph, outputs);
                graph.push(Op::Unary(*unary, x))
            }
            Expression::Binary(binary, a, b) => {
                let number = |of: &Expression| match of {
                    Expression::Number(value) => Some(*value),
                    _ => None,
                };
                let affine = |graph: &mut Graph, x: &Expression, gain: f32, add: f32| {
                    let x = x.add_to(graph, outputs);
                    graph.push(Op::Affine { x, gain: Arc::new(vec![gain]), add: Arc::new(vec![add]) })
                };
                match (binary, number(a), number(b)) {
                    (Binary::Mul, Some(gain), _) => affine(graph, b, gain, 0.0),
                    (Binary::Mul, _, Some(gain)) => affine(graph, a, gain, 0.0),
                    (Binary::Add, Some(add), _) => affine(graph, b, 1.0, add),
                    (Binary::Add, _, Some(add)) => affine(graph, a, 1.0, add),
                    (Binary::Sub, _, Some(less)) => affine(graph, a, 1.0, -less),
                    _ => {
                        let (a, b) = (a.add_to(graph, outputs), b.add_to(graph, outputs));
                        graph.push(Op::Binary(*binary, a, b))
                    }
                }
            }
        }
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    names: Vec<String>,
    depth: usize,
}

impl Parser<'_> {
    fn wrong(&self, what: &str) -> String {
        format!("at character {}: {what}", self.text[..self.at].chars().count() + 1)
    }

    /// The next character that is no space.
    fn peek(&mut self) -> Option<char> {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
        self.text[self.at..].chars().next()
    }

    fn eat(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        self.at += if found { wanted.len_utf8() } else { 0 };
        found
    }

    fn sum(&mut self) -> Result<Expression, String> {
        self.depth += 1;
        if self.depth > MOST_DEPTH {
            return Err(self.wrong("nested too deeply"));
        }
        let mut left = self.product()?;
        loop {
            let binary = if self.eat('+') {
                Binary::Add
            } else if self.eat('-') {
                Binary::Sub
            } else {
                self.depth -= 1;
                return Ok(left);
            };
            left = Expression::Binary(binary, Box::new(left), Box::new(self.product()?));
        }
    }

    fn product(&mut self) -> Result<Expression, String> {
        let mut left = self.factor()?;
        loop {
            let binary = if self.eat('*') {
                Binary::Mul
            } else if self.eat('/') {
                Binary::Div
            } else {
                return Ok(left);
            };
            left = Expression::Binary(binary, Box::new(left), Box::new(self.factor()?));
        }
    }

    fn factor(&mut self) -> Result<Expression, String> {
        match self.peek() {
            Some('-') => {
                self.at += 1;
                self.depth += 1;
                if self.depth > MOST_DEPTH {
                    return Err(self.wrong("nested too deeply"));
                }
                let of = Box::new(self.factor()?);
                self.depth -= 1;
                Ok(Expression::Binary(Binary::Mul, Box::new(Expression::Number(-1.0)), of))
            }
            Some('(') => {
                self.at += 1;
                let inner = self.sum()?;
                if self.eat(')') { Ok(inner) } else { Err(self.wrong("a `)` is missing")) }
            }
            Some(c) if c.is_ascii_digit() || c == '.' => self.number(),
            Some(c) if c.is_alphabetic() || c == '_' => self.name(),
            Some(other) => Err(self.wrong(&format!("`{other}` where a number, a name or a `(` should be"))),
            None => Err(self.wrong("ends where a number, a name or a `(` should be")),
        }
    }

    fn number(&mut self) -> Result<Expression, String> {
        let rest = &self.text[self.at..];
        let mut end = 0;
        for (at, c) in rest.char_indices() {
            let sign = matches!(c, '+' | '-') && rest[..at].ends_with(['e', 'E']);
            if !(c.is_ascii_digit() || matches!(c, '.' | 'e' | 'E') || sign) {
                break;
            }
            end = at + c.len_utf8();
        }
        let value = rest[..end].parse::<f32>().ok().filter(|v| v.is_finite());
        let value = value.ok_or_else(|| self.wrong(&format!("`{}` is not a number", &rest[..end])))?;
        self.at += end;
        Ok(Expression::Number(value))
    }

    fn name(&mut self) -> Result<Expression, String> {
        let rest = &self.text[self.at..];
        let end = rest.find(|c: char| !(c.is_alphanumeric() || "_.:/".contains(c))).unwrap_or(rest.len());
        // A `/` between names divides.
        let name = rest[..end].trim_end_matches('/');
        let (name, _) = name.split_once('/').unwrap_or((name, ""));
        let (name, start) = (name.to_owned(), self.at);
        self.at += name.len();
        if !self.eat('(') {
            let known = self.names.iter().position(|known| *known == name);
            return Ok(Expression::Output(known.unwrap_or_else(|| {
                self.names.push(name);
                self.names.len() - 1
            })));
        }
        let (unary, binary) = match name.as_str() {
            "exp" => (Some(Unary::Exp), None),
            "log" => (Some(Unary::Log), None),
            "sqrt" => (Some(Unary::Sqrt), None),
            "sigmoid" => (Some(Unary::Sigmoid), None),
            "tanh" => (Some(Unary::Tanh), None),
            "pow" => (None, Some(Binary::Pow)),
            "max" => (None, Some(Binary::Max)),
            "min" => (None, Some(Binary::Min)),
            _ => {
                self.at = start;
                let known = "exp, log, sqrt, sigmoid, tanh, pow, max, min";
                return Err(self.wrong(&format!("no function `{name}`; there are {known}")));
            }
        };
        let first = Box::new(self.sum()?);
        let result = match (unary, binary) {
            (Some(unary), _) => Expression::Unary(unary, first),
            (_, Some(binary)) if self.eat(',') => Expression::Binary(binary, first, Box::new(self.sum()?)),
            _ => return Err(self.wrong(&format!("`{name}` is of two parts with a `,` between them"))),
        };
        if self.eat(')') { Ok(result) } else { Err(self.wrong("a `)` is missing")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str, outputs: &[f32]) -> f32 {
        Expression::parse(text).unwrap().0.value(&|at| outputs[at])
    }

    #[test]
    fn arithmetic_as_one_reads_it() {
        let (parsed, names) = Expression::parse("0.7 * click + 0.3 * purchase - click").unwrap();
        assert_eq!(names, ["click", "purchase"]);
        assert!((parsed.value(&|at| [0.5, 2.0][at]) - (0.35 + 0.6 - 0.5)).abs() < 1e-6);
        assert_eq!(value("-(a - 2) * 3 / b", &[5.0, 2.0]), -4.5);
        assert_eq!(value("a/b", &[6.0, 3.0]), 2.0);
        assert_eq!(value("pow(a, 2) + max(b, 1e1)", &[3.0, 4.0]), 19.0);
        assert_eq!(value("sigmoid(log(exp(a)))", &[0.0]), 0.5);
    }

    #[test]
    fn mistakes_are_named_with_their_place() {
        let error = |text: &str| Expression::parse(text).unwrap_err();
        assert_eq!(error("1 + 2"), "names no output");
        assert_eq!(error("a + "), "at character 5: ends where a number, a name or a `(` should be");
        assert_eq!(error("a b"), "at character 3: `b` where the expression should end");
        assert_eq!(error("(a"), "at character 3: a `)` is missing");
        assert!(error("a * 1.2.3").contains("at character 5: `1.2.3` is not a number"));
        assert!(error("ä + cosh(b)").starts_with("at character 5: no function `cosh`"));
        assert!(error("pow(a)").contains("of two parts"));
        assert!(error(&"(".repeat(100_000)).contains("nested too deeply"));
        assert!(error(&format!("{}a", "-".repeat(100_000))).contains("nested too deeply"));
    }
}
