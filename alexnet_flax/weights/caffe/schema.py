"""The part of Caffe's protobuf schema that an AlexNet uses, built without generated code.

Field numbers are those of BVLC/caffe, src/caffe/proto/caffe.proto. A blob's numbers are declared as
bytes: packed floats have the same encoding, and 60 million of them are read without a Python object each.
"""

import functools
from typing import Any

_PACKAGE = 'alexnet_flax_caffe'  # not 'caffe': another schema of that name may be loaded beside this one

# Message -> field -> (number, type); '*' marks repeated, '+' repeated and packed.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
  'BlobShape': {'dim': (1, 'int64+')},
  'BlobProto': {
    'num': (1, 'int32'),
    'channels': (2, 'int32'),
    'height': (3, 'int32'),
    'width': (4, 'int32'),
    'data': (5, 'bytes'),
    'shape': (7, 'BlobShape'),
    'double_data': (8, 'bytes'),
  },
  'ParamSpec': {'lr_mult': (3, 'float'), 'decay_mult': (4, 'float')},
  'InputParameter': {'shape': (1, 'BlobShape*')},
  'TransformationParameter': {'scale': (1, 'float'), 'mean_file': (4, 'string'), 'mean_value': (5, 'float*')},
  'ConvolutionParameter': {
    'num_output': (1, 'uint32'),
    'bias_term': (2, 'bool'),
    'pad': (3, 'uint32*'),
    'kernel_size': (4, 'uint32*'),
    'group': (5, 'uint32'),
    'stride': (6, 'uint32*'),
  },
  'InnerProductParameter': {'num_output': (1, 'uint32'), 'bias_term': (2, 'bool')},
  'LRNParameter': {
    'local_size': (1, 'uint32'),
    'alpha': (2, 'float'),
    'beta': (3, 'float'),
    'norm_region': (4, 'NormRegion'),
    'k': (5, 'float'),
  },
  'PoolingParameter': {
    'pool': (1, 'PoolMethod'),
    'kernel_size': (2, 'uint32'),
    'stride': (3, 'uint32'),
    'pad': (4, 'uint32'),
  },
  'ReLUParameter': {'negative_slope': (1, 'float')},
  'DropoutParameter': {'dropout_ratio': (1, 'float')},
  'BatchNormParameter': {
    'use_global_stats': (1, 'bool'),
    'moving_average_fraction': (2, 'float'),
    'eps': (3, 'float'),
  },
  'ScaleParameter': {'bias_term': (4, 'bool')},
  'LayerParameter': {
    'name': (1, 'string'),
    'type': (2, 'string'),
    'bottom': (3, 'string*'),
    'top': (4, 'string*'),
    'param': (6, 'ParamSpec*'),
    'blobs': (7, 'BlobProto*'),
    'transform_param': (100, 'TransformationParameter'),
    'convolution_param': (106, 'ConvolutionParameter'),
    'dropout_param': (108, 'DropoutParameter'),
    'inner_product_param': (117, 'InnerProductParameter'),
    'lrn_param': (118, 'LRNParameter'),
    'pooling_param': (121, 'PoolingParameter'),
    'relu_param': (123, 'ReLUParameter'),
    'batch_norm_param': (139, 'BatchNormParameter'),
    'scale_param': (142, 'ScaleParameter'),
    'input_param': (143, 'InputParameter'),
  },
  # Files written before 2015, as the published bvlc_alexnet.caffemodel, have these.
  'V1LayerParameter': {
    'bottom': (2, 'string*'),
    'top': (3, 'string*'),
    'name': (4, 'string'),
    'type': (5, 'int32'),
    'blobs': (6, 'BlobProto*'),
    'convolution_param': (10, 'ConvolutionParameter'),
    'dropout_param': (12, 'DropoutParameter'),
    'inner_product_param': (17, 'InnerProductParameter'),
    'lrn_param': (18, 'LRNParameter'),
    'pooling_param': (19, 'PoolingParameter'),
    'relu_param': (30, 'ReLUParameter'),
    'transform_param': (36, 'TransformationParameter'),
  },
  'NetParameter': {
    'name': (1, 'string'),
    'layers': (2, 'V1LayerParameter*'),
    'layer': (100, 'LayerParameter*'),
  },
}
_ENUMS: dict[str, tuple[str, ...]] = {
  'NormRegion': ('ACROSS_CHANNELS', 'WITHIN_CHANNEL'),
  'PoolMethod': ('MAX', 'AVE'),
}
# V1's numbers for the kinds of layers that matter here; the others are named by their numbers.
V1_TYPES: dict[int, str] = {
  1: 'Accuracy',
  4: 'Convolution',
  5: 'Data',
  6: 'Dropout',
  12: 'ImageData',
  14: 'InnerProduct',
  15: 'LRN',
  17: 'Pooling',
  18: 'ReLU',
  20: 'Softmax',
  21: 'SoftmaxWithLoss',
  22: 'Split',
  29: 'MemoryData',
}


@functools.cache
def net_parameter() -> Any:
  """Returns the class of a Caffe network, `NetParameter`."""
  from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

  field_type = descriptor_pb2.FieldDescriptorProto
  file = descriptor_pb2.FileDescriptorProto(name=f'{_PACKAGE}.proto', package=_PACKAGE, syntax='proto2')
  for name, values in _ENUMS.items():
    enum = file.enum_type.add(name=name)
    for number, value in enumerate(values):
      enum.value.add(name=value, number=number)
  for name, fields in _MESSAGES.items():
    message = file.message_type.add(name=name)
    for field, (number, kind) in fields.items():
      plain = kind.rstrip('*+')
      label = field_type.LABEL_OPTIONAL if plain == kind else field_type.LABEL_REPEATED
      added = message.field.add(name=field, number=number, label=label)
      if plain in _MESSAGES or plain in _ENUMS:
        added.type = field_type.TYPE_MESSAGE if plain in _MESSAGES else field_type.TYPE_ENUM
        added.type_name = f'.{_PACKAGE}.{plain}'
      else:
        added.type = getattr(field_type, f'TYPE_{plain.upper()}')
      if kind.endswith('+'):
        added.options.packed = True
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName(f'{_PACKAGE}.NetParameter'))
