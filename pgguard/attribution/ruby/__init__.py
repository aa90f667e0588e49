"""Ruby's lines of code, told by the Ruby processes themselves: ``pgguard run --ruby-stacks``.

``pgguard_ruby_stacks.rb`` is the file that they load, :mod:`~pgguard.attribution.ruby.loading` has them load it, and
:mod:`~pgguard.attribution.ruby.pipes` asks them. It imports neither the rest of attribution's looks nor the proxy.
"""
