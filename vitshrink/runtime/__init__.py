"""What any long job needs: processes, resumable state, caches, locks, and an observer."""
