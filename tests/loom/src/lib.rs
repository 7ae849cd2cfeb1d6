//! The store's own source, compiled without the rest of the product, so that loom can run it.
//!
//! `store.rs` needs one thing from outside: the trait that [`mesh`] repeats here, word for word.

/// What the store asks of a published value.
pub mod mesh {
    /// Anything publishable: `store::Publisher` tells it its generation before it is shared.
    pub trait Generation {
        /// Stores the generation that the publisher gave it.
        fn set_generation(&mut self, generation: u64);
    }
}

#[path = "../../../src/store.rs"]
pub mod store;
