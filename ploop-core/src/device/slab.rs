//! Numbered places for what is in flight: no allocation per request once it has grown.

/// Values under small numbers, which are reused after removal.
pub(super) struct Slab<T> {
    places: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Slab<T> {
    pub(super) fn new() -> Self {
        Self { places: Vec::new(), free: Vec::new() }
    }

    /// Keeps `value` and returns its number.
    pub(super) fn insert(&mut self, value: T) -> usize {
        match self.free.pop() {
            Some(number) => {
                self.places[number] = Some(value);
                number
            }
            None => {
                self.places.push(Some(value));
                self.places.len() - 1
            }
        }
    }

    pub(super) fn get_mut(&mut self, number: usize) -> Option<&mut T> {
        self.places.get_mut(number).and_then(Option::as_mut)
    }

    pub(super) fn get(&self, number: usize) -> Option<&T> {
        self.places.get(number).and_then(Option::as_ref)
    }

    pub(super) fn remove(&mut self, number: usize) -> Option<T> {
        let value = self.places.get_mut(number).and_then(Option::take);
        if value.is_some() {
            self.free.push(number);
        }
        value
    }

    pub(super) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Numbers in use, ascending.
    pub(super) fn numbers(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.places.len()).filter(|&number| self.places[number].is_some())
    }

    /// Takes everything out.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = T> + '_ {
        self.free.clear();
        self.places.drain(..).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_reused() {
        let mut slab = Slab::new();
        let (first, second) = (slab.insert('a'), slab.insert('b'));
        assert_eq!((slab.remove(first), slab.remove(first)), (Some('a'), None));
        assert_eq!(slab.insert('c'), first);
        assert_eq!((slab.len(), slab.get(second).copied()), (2, Some('b')));
        assert_eq!(slab.drain().count(), 2);
        assert_eq!(slab.len(), 0);
    }
}
