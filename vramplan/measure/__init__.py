"""The third witness: real training steps on the local GPU. Imports torch only in its workers."""
