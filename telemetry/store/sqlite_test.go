package store

// writerOf is what an SQLite Store writes with.
func writerOf(s *Store) *writer { return s.db.(*sqliteDB).writer }
