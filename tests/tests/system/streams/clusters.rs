//! x
pub(crate) fn logs_and_exec(){}
