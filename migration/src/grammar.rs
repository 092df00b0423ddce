//! What the grammars of a line share: an error that tells where it is not as it has to be, and what was expected there.

use nom::combinator::all_consuming;
use nom::error::{ContextError, ErrorKind, ParseError};
use nom::{Finish, IResult, Parser};

/// The error of a grammar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Misfit<'t> {
    /// The line from the place at fault on.
    pub(crate) rest: &'t str,
    /// What should be there: the innermost context.
    pub(crate) expected: &'static str,
}

pub(crate) type Parsed<'t, T> = IResult<&'t str, T, Misfit<'t>>;

impl<'t> Misfit<'t> {
    /// The end of what may be tried: nothing else fits.
    pub(crate) fn failure(rest: &'t str, expected: &'static str) -> nom::Err<Self> {
        nom::Err::Failure(Misfit { rest, expected })
    }

    /// Bytes before the place at fault in the line, of which `rest` is the end.
    pub(crate) fn offset(&self, line: &str) -> u64 {
        line.len().saturating_sub(self.rest.len()) as u64
    }
}

impl<'t> ParseError<&'t str> for Misfit<'t> {
    fn from_error_kind(rest: &'t str, kind: ErrorKind) -> Self {
        Misfit { rest, expected: if kind == ErrorKind::Eof { "the end" } else { "" } }
    }

    fn append(_: &'t str, _: ErrorKind, other: Self) -> Self {
        other
    }
}

impl<'t> ContextError<&'t str> for Misfit<'t> {
    fn add_context(_: &'t str, expected: &'static str, other: Self) -> Self {
        if other.expected.is_empty() { Misfit { expected, ..other } } else { other }
    }
}

/// Reads all of a line.
pub(crate) fn whole<'t, T>(
    line: &'t str,
    parser: impl Parser<&'t str, Output = T, Error = Misfit<'t>>,
) -> Result<T, Misfit<'t>> {
    all_consuming(parser).parse(line).finish().map(|(_, value)| value)
}
