//! The rows that the stages hand to each other
