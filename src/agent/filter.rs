//! Consul's filter expressions (`Service.Meta.version == v1 and "a" in Service.Tags`), as far as proxies and people use them.
//!
//! Operators: `==`, `!=`, `in`, `not in`, `contains`, `is empty`, `is not empty`, `and`, `or`, `not`, parentheses.
//! Invariant: a filter that parsed evaluates without failing; a selector that does not exist was refused when parsed.
//! Pure. Hostile text is a [`FilterError`]; nesting is bounded by [`DEPTH_MAX`], length by [`FILTER_BYTES_MAX`].

use serde_json::Value;

/// Longest filter accepted.
pub(super) const FILTER_BYTES_MAX: usize = 4_096;
/// Deepest nesting of parentheses and `not`.
const DEPTH_MAX: usize = 32;

/// Why a filter was refused; the text is Consul's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum FilterError {
    /// The expression does not parse.
    #[error("Failed to create boolean expression evaluator: {0}")]
    Syntax(String),
    /// A selector names no field of the listed things.
    #[error("Failed to create boolean expression evaluator: Selector \"{0}\" is not valid")]
    Selector(String),
}

/// A parsed filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Filter {
    /// Lets everything through.
    All,
    /// Both.
    And(Box<Self>, Box<Self>),
    /// Either.
    Or(Box<Self>, Box<Self>),
    /// The contrary.
    Not(Box<Self>),
    /// Equal to a literal.
    Equal(Vec<String>, String),
    /// A list that holds, a text that contains, or a map that has the literal.
    Contains(Vec<String>, String),
    /// Absent or without elements.
    Empty(Vec<String>),
}

impl Filter {
    /// Parses `text`; `roots` are the selectors' valid beginnings, dotted (`Service.Meta`).
    pub(super) fn parse(text: &str, roots: &[&str]) -> Result<Self, FilterError> {
        if text.len() > FILTER_BYTES_MAX {
            return Err(FilterError::Syntax(format!("{} bytes are more than {FILTER_BYTES_MAX}", text.len())));
        }
        let tokens = tokens(text)?;
        if tokens.is_empty() {
            return Ok(Self::All);
        }
        let mut parser = Parser { tokens: &tokens, at: 0, roots };
        let filter = parser.or(0)?;
        match parser.peek() {
            None => Ok(filter),
            Some(token) => Err(FilterError::Syntax(format!("unexpected {token} after the expression"))),
        }
    }

    /// Whether `item` passes.
    pub(super) fn matches(&self, item: &Value) -> bool {
        match self {
            Self::All => true,
            Self::And(a, b) => a.matches(item) && b.matches(item),
            Self::Or(a, b) => a.matches(item) || b.matches(item),
            Self::Not(inner) => !inner.matches(item),
            Self::Equal(path, literal) => select(item, path).is_some_and(|found| text_of(found) == *literal),
            Self::Contains(path, literal) => match select(item, path) {
                Some(Value::Array(items)) => items.iter().any(|found| text_of(found) == *literal),
                Some(Value::Object(fields)) => fields.contains_key(literal),
                Some(Value::String(text)) => text.contains(literal.as_str()),
                _ => false,
            },
            Self::Empty(path) => match select(item, path) {
                None | Some(Value::Null) => true,
                Some(Value::Array(items)) => items.is_empty(),
                Some(Value::Object(fields)) => fields.is_empty(),
                Some(Value::String(text)) => text.is_empty(),
                Some(_) => false,
            },
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    /// A bare word or dotted selector, already split.
    Word(Vec<String>),
    /// A quoted literal.
    Quoted(String),
    Equal,
    NotEqual,
    Open,
    Close,
}

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Word(parts) => write!(f, "{:?}", parts.join(".")),
            Self::Quoted(text) => write!(f, "{text:?}"),
            Self::Equal => f.write_str("=="),
            Self::NotEqual => f.write_str("!="),
            Self::Open => f.write_str("("),
            Self::Close => f.write_str(")"),
        }
    }
}

fn tokens(text: &str) -> Result<Vec<Token>, FilterError> {
    let mut out = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let (token, used) = match first {
            '(' => (Token::Open, 1),
            ')' => (Token::Close, 1),
            '=' if rest.starts_with("==") => (Token::Equal, 2),
            '!' if rest.starts_with("!=") => (Token::NotEqual, 2),
            '"' | '`' => {
                let (literal, used) = quoted(rest, first)?;
                (Token::Quoted(literal), used)
            }
            c if is_word(c) => word(rest)?,
            c => {
                return Err(FilterError::Syntax(format!("no match found at {c:?}, expected a selector, a value or an operator")));
            }
        };
        out.push(token);
        rest = rest[used..].trim_start();
    }
    Ok(out)
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '/' | ':' | '*')
}

/// A quoted literal at the start of `rest`, and the bytes it takes.
fn quoted(rest: &str, quote: char) -> Result<(String, usize), FilterError> {
    match rest[1..].find(quote) {
        Some(end) => Ok((rest[1..=end].to_owned(), end + 2)),
        None => Err(FilterError::Syntax(format!("the {quote} at {rest:?} is never closed"))),
    }
}

/// A selector or bare value: dotted parts, of which later ones may be quoted as `["a.b"]`.
fn word(rest: &str) -> Result<(Token, usize), FilterError> {
    let mut used = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
    let mut parts: Vec<String> = rest[..used].split('.').map(str::to_owned).collect();
    while rest[used..].starts_with("[\"") {
        let (key, taken) = quoted(&rest[used + 1..], '"')?;
        used += 1 + taken;
        if !rest[used..].starts_with(']') {
            return Err(FilterError::Syntax("a [\" without \"]".to_owned()));
        }
        parts.push(key);
        used += 1;
    }
    Ok((Token::Word(parts), used))
}

struct Parser<'a> {
    tokens: &'a [Token],
    at: usize,
    roots: &'a [&'a str],
}

impl Parser<'_> {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at)
    }

    /// Takes the next token when it is the bare word `keyword`.
    fn keyword(&mut self, keyword: &str) -> bool {
        let found = matches!(self.peek(), Some(Token::Word(parts)) if parts.len() == 1 && parts[0].eq_ignore_ascii_case(keyword));
        self.at += usize::from(found);
        found
    }

    fn or(&mut self, depth: usize) -> Result<Filter, FilterError> {
        let mut left = self.and(depth)?;
        while self.keyword("or") {
            left = Filter::Or(Box::new(left), Box::new(self.and(depth)?));
        }
        Ok(left)
    }

    fn and(&mut self, depth: usize) -> Result<Filter, FilterError> {
        let mut left = self.unary(depth)?;
        while self.keyword("and") {
            left = Filter::And(Box::new(left), Box::new(self.unary(depth)?));
        }
        Ok(left)
    }

    fn unary(&mut self, depth: usize) -> Result<Filter, FilterError> {
        if depth > DEPTH_MAX {
            return Err(FilterError::Syntax(format!("nested more than {DEPTH_MAX} deep")));
        }
        if self.keyword("not") {
            return Ok(Filter::Not(Box::new(self.unary(depth + 1)?)));
        }
        if self.peek() == Some(&Token::Open) {
            self.at += 1;
            let inner = self.or(depth + 1)?;
            if self.peek() != Some(&Token::Close) {
                return Err(FilterError::Syntax("a ( is never closed".to_owned()));
            }
            self.at += 1;
            return Ok(inner);
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Result<Filter, FilterError> {
        // `value in Selector` has the literal first.
        let first = self.next()?;
        if self.keyword("in") {
            return Ok(Filter::Contains(self.selector()?, literal(&first)?));
        }
        if self.keyword("not") {
            if !self.keyword("in") {
                let selector = self.check_selector(first)?;
                return self.negated_contains(selector);
            }
            return Ok(Filter::Not(Box::new(Filter::Contains(self.selector()?, literal(&first)?))));
        }
        let selector = self.check_selector(first)?;
        if self.keyword("is") {
            let not = self.keyword("not");
            if !self.keyword("empty") {
                return Err(FilterError::Syntax("`is` must be followed by `empty` or `not empty`".to_owned()));
            }
            let empty = Filter::Empty(selector);
            return Ok(if not { Filter::Not(Box::new(empty)) } else { empty });
        }
        if self.keyword("contains") {
            return Ok(Filter::Contains(selector, literal(&self.next()?)?));
        }
        match self.next()? {
            Token::Equal => Ok(Filter::Equal(selector, literal(&self.next()?)?)),
            Token::NotEqual => Ok(Filter::Not(Box::new(Filter::Equal(selector, literal(&self.next()?)?)))),
            other => Err(FilterError::Syntax(format!(
                "no match found at {other}, expected \"!=\", \"==\", \"in\", \"contains\" or \"is\""
            ))),
        }
    }

    fn negated_contains(&mut self, selector: Vec<String>) -> Result<Filter, FilterError> {
        if !self.keyword("contains") {
            return Err(FilterError::Syntax("`not` must be followed by `in` or `contains`".to_owned()));
        }
        Ok(Filter::Not(Box::new(Filter::Contains(selector, literal(&self.next()?)?))))
    }

    fn next(&mut self) -> Result<Token, FilterError> {
        let token =
            self.peek().cloned().ok_or_else(|| FilterError::Syntax("no match found, the expression ends early".to_owned()))?;
        self.at += 1;
        Ok(token)
    }

    fn selector(&mut self) -> Result<Vec<String>, FilterError> {
        let token = self.next()?;
        self.check_selector(token)
    }

    fn check_selector(&self, token: Token) -> Result<Vec<String>, FilterError> {
        let Token::Word(parts) = token else {
            return Err(FilterError::Syntax(format!("{token} is not a selector")));
        };
        let dotted = parts.join(".");
        let known = |root: &&&str| dotted == **root || dotted.strip_prefix(**root).is_some_and(|rest| rest.starts_with('.'));
        if self.roots.iter().find(known).is_some() { Ok(parts) } else { Err(FilterError::Selector(dotted)) }
    }
}

fn literal(token: &Token) -> Result<String, FilterError> {
    match token {
        Token::Quoted(text) => Ok(text.clone()),
        Token::Word(parts) => Ok(parts.join(".")),
        other => Err(FilterError::Syntax(format!("{other} is not a value"))),
    }
}

fn select<'a>(item: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(item, |value, key| value.get(key))
}

fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const ROOTS: [&str; 4] = ["Service.Meta", "Service.Tags", "Service.Port", "Kind"];

    fn passes(text: &str) -> bool {
        let item =
            json!({"Kind": "connect-proxy", "Service": {"Meta": {"version": "v1", "a.b": "c"}, "Tags": ["x"], "Port": 80}});
        Filter::parse(text, &ROOTS).unwrap_or_else(|error| panic!("{text}: {error}")).matches(&item)
    }

    #[test]
    fn expressions_that_proxies_send_work() {
        for yes in [
            "",
            "Service.Meta.version == v1",
            "Service.Meta.version == \"v1\" and Kind==`connect-proxy`",
            "Service.Meta.version != v2",
            "Service.Port == 80",
            "x in Service.Tags",
            "Service.Tags contains x",
            "y not in Service.Tags",
            "not (Kind == a or Kind == b)",
            "Service.Meta[\"a.b\"] == c",
            "Service.Meta.none is empty",
            "Service.Tags is not empty",
            "Kind == a or Kind == connect-proxy and Service.Port == 80",
        ] {
            assert!(passes(yes), "{yes}");
        }
        for no in ["Service.Meta.version == v2", "Service.Meta.none == v1", "Service.Tags not contains x"] {
            assert!(!passes(no), "{no}");
        }
    }

    #[test]
    fn what_does_not_parse_is_refused() {
        for bad in ["xx", "Kind =", "Kind == ", "(Kind == a", "Kind == a b", "Foo == a", "Kindx == a", "\"open", "Kind is", "!"] {
            assert!(Filter::parse(bad, &ROOTS).is_err(), "{bad}");
        }
        assert_eq!(
            Filter::parse("Foo == a", &ROOTS).expect_err("refused").to_string(),
            "Failed to create boolean expression evaluator: Selector \"Foo\" is not valid"
        );
        assert!(Filter::parse(&"(".repeat(2_000), &ROOTS).is_err());
    }

    proptest! {
        #[test]
        fn parse_never_panics(text in "\\PC{0,80}") {
            let _ = Filter::parse(&text, &ROOTS);
        }
    }
}
