"""`alexnet-flax hub push` and `alexnet-flax hub pull`."""

import argparse

from alexnet_flax.cli.options import NETWORK, add_network, network_options

HELP = 'push trained networks to the Hugging Face Hub, or pull them'
DESCRIPTION = (
  'A repository holds model.safetensors, config.json and README.md, a model card. Every command reads'
  ' hf:OWNER/NAME[@REVISION] as it reads a weights file.'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  actions = parser.add_subparsers(dest='action', required=True, metavar='push|pull')
  push = actions.add_parser('push', help='write a network to a repository, which is made if there is none')
  push.add_argument('network', metavar='NETWORK', help=NETWORK)
  push.add_argument('repository', metavar='OWNER/NAME')
  push.add_argument('--private', action='store_true', help='make the new repository a private one')
  add_network(push)
  pull = actions.add_parser('pull', help="copy a repository's network into a folder")
  pull.add_argument('repository', metavar='OWNER/NAME[@REVISION]')
  pull.add_argument('--out', metavar='DIR', help='(default: NAME)')


def run(arguments: argparse.Namespace) -> None:
  from alexnet_flax.export import hub

  if arguments.action == 'pull':
    hub.pull(arguments.repository, arguments.out)
  else:
    options = network_options(arguments)
    hub.push(arguments.network, arguments.repository, private=arguments.private, **options)
