"""The feature bank: profiles on disk, served and kept up to date without RecBole.

:mod:`store` holds the files: what is committed, what is whole, who may write.
"""
