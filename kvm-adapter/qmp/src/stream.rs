//! Cuts what a client sends into messages, where QEMU's parser would cut it, in bounded memory.

use std::fmt;

/// The longest message, in bytes (QEMU: 64 MiB). None that a command has use for comes near it.
pub(crate) const MAX_MESSAGE: usize = 64 << 10;
/// The deepest nesting (QEMU: 1024).
pub(crate) const MAX_DEPTH: usize = 64;

/// Why no message came of what was sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Malformed {
    /// A byte that can stand nowhere, or not here.
    Stray(u8),
    /// The message is too long.
    Long,
    /// The message is nested too deeply.
    Deep,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stray(byte) => write!(f, "JSON parse error, stray '{}'", byte.escape_ascii()),
            Self::Long => write!(f, "JSON message size limit exceeded: {MAX_MESSAGE} bytes are allowed"),
            Self::Deep => write!(f, "JSON nesting depth limit exceeded: {MAX_DEPTH} levels are allowed"),
        }
    }
}

/// The text of the message that is being received, and where in it the stream is.
#[derive(Debug, Default)]
pub(crate) struct Splitter {
    text: Vec<u8>,
    /// Brackets and braces that are open. Which closes which is the parser's business.
    depth: usize,
    /// The quote that ends the string, and whether the next byte is escaped.
    string: Option<(u8, bool)>,
    /// A number or a word, outside of everything.
    word: bool,
    skip: Skip,
}

/// What is thrown away.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
enum Skip {
    #[default]
    Nothing,
    /// After a stray byte: everything up to where a message may begin.
    ToNext,
    /// The rest of a message that was refused.
    Rest,
}

impl Splitter {
    /// Takes one byte; returns what ends with it: the text of a message, or an error, once for each.
    pub(crate) fn push(&mut self, byte: u8) -> Option<Result<Vec<u8>, Malformed>> {
        // No UTF-8 text has the first ones, no JSON text the others: clients send one to be sure of a fresh start.
        let nowhere = byte >= 0xfe || byte < b' ' && (self.string.is_some() || !byte.is_ascii_whitespace());
        if self.word && !nowhere {
            return self.push_to_word(byte);
        }
        let opens = matches!(byte, b'{' | b'[') || byte == b'"' || byte == b'\'';
        let idle = self.depth == 0 && self.string.is_none();
        if idle && in_word(byte) && self.skip == Skip::Nothing {
            self.word = true;
            self.keep(byte);
            return None;
        }
        if nowhere || idle && !opens && !byte.is_ascii_whitespace() {
            let told = self.skip == Skip::ToNext;
            *self = Self { skip: Skip::ToNext, ..Self::default() };
            return (!told).then_some(Err(Malformed::Stray(byte)));
        }
        if idle {
            if byte.is_ascii_whitespace() || self.skip == Skip::ToNext && !matches!(byte, b'{' | b'[') {
                return None;
            }
            self.skip = Skip::Nothing;
        }
        self.advance(byte);
        if self.skip == Skip::Nothing && (self.text.len() > MAX_MESSAGE || self.depth > MAX_DEPTH) {
            self.skip = Skip::Rest;
            self.text = Vec::new();
            return Some(Err(if self.depth > MAX_DEPTH { Malformed::Deep } else { Malformed::Long }));
        }
        if self.depth > 0 || self.string.is_some() {
            return None;
        }
        let whole = std::mem::take(self);
        (whole.skip == Skip::Nothing).then_some(Ok(whole.text))
    }

    /// A byte after the first of a number or word, which lasts to the first that cannot be in one.
    fn push_to_word(&mut self, byte: u8) -> Option<Result<Vec<u8>, Malformed>> {
        if in_word(byte) {
            self.advance(byte);
            let long = self.skip == Skip::Nothing && self.text.len() > MAX_MESSAGE;
            if long {
                self.skip = Skip::Rest;
                self.text = Vec::new();
            }
            return long.then_some(Err(Malformed::Long));
        }
        self.plain_zero();
        let word = std::mem::take(self);
        // One answer a byte: what is wrong with this one is skipped with it, as after a stray byte.
        if self.push(byte).is_some() {
            self.skip = Skip::ToNext;
        }
        (word.skip == Skip::Nothing).then_some(Ok(word.text))
    }

    /// A number that has just ended and is `-0` is 0 to QEMU; to our parser it would be a fraction.
    fn plain_zero(&mut self) {
        let start = self.text.len().saturating_sub(2);
        if self.text.ends_with(b"-0") && !start.checked_sub(1).is_some_and(|before| in_word(self.text[before])) {
            self.text.remove(start);
        }
    }

    fn advance(&mut self, byte: u8) {
        if self.string.is_none() && !in_word(byte) {
            self.plain_zero();
        }
        match (self.string, byte) {
            // QEMU takes single quotes too, and JSON knows no such escape.
            (Some((quote, true)), b'\'') => {
                self.string = Some((quote, false));
                self.text.pop();
                return self.keep(b'\'');
            }
            (Some((quote, true)), _) => self.string = Some((quote, false)),
            (Some((quote, false)), b'\\') => self.string = Some((quote, true)),
            (Some((quote, false)), _) if byte == quote => {
                self.string = None;
                return self.keep(b'"');
            }
            (Some(_), b'"') => self.keep(b'\\'),
            (Some(_), _) => {}
            (None, b'"' | b'\'') => {
                self.string = Some((byte, false));
                return self.keep(b'"');
            }
            (None, b'{' | b'[') => self.depth += 1,
            (None, b'}' | b']') => self.depth -= 1,
            (None, _) => {}
        }
        self.keep(byte);
    }

    fn keep(&mut self, byte: u8) {
        if self.skip == Skip::Nothing {
            self.text.push(byte);
        }
    }
}

/// Whether numbers and keywords have it.
fn in_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'.' | b'_')
}
