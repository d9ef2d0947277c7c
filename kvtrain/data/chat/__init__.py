"""Chats in, packed token batches with the loss on the assistant's tokens out.

``formats`` makes rows of files chats, ``rendering`` makes chats tokens with their loss mask, ``prepare`` writes these
into shards, ``packing`` packs them into rows, ``module`` hands those to a training, ``picture`` shows what is learned.
"""
