"""The part of Caffe's protobuf schema that an AlexNet uses, built without generated code.

Field numbers are those of BVLC/caffe, src/caffe/proto/caffe.proto. A blob's numbers are declared as
bytes: packed floats have the same encoding, and 60 million of them are read without a Python object each.
"""

import functools
import re
from typing import Any

_PACKAGE = 'alexnet_flax_caffe'  # not 'caffe': another schema of that name may be loaded beside this one

# One message a paragraph, its fields as in the .proto; '*' marks repeated, '+' repeated and packed.
_MESSAGES = """
BlobShape: int64+ dim = 1
BlobProto: int32 num = 1, int32 channels = 2, int32 height = 3, int32 width = 4, bytes data = 5,
  BlobShape shape = 7, bytes double_data = 8
ParamSpec: float lr_mult = 3, float decay_mult = 4
InputParameter: BlobShape* shape = 1
TransformationParameter: float scale = 1, uint32 crop_size = 3, string mean_file = 4, float* mean_value = 5
ConvolutionParameter: uint32 num_output = 1, bool bias_term = 2, uint32* pad = 3, uint32* kernel_size = 4,
  uint32 group = 5, uint32* stride = 6, uint32* dilation = 18
InnerProductParameter: uint32 num_output = 1, bool bias_term = 2
LRNParameter: uint32 local_size = 1, float alpha = 2, float beta = 3, NormRegion norm_region = 4, float k = 5
PoolingParameter: PoolMethod pool = 1, uint32 kernel_size = 2, uint32 stride = 3, uint32 pad = 4,
  RoundMode round_mode = 13
ReLUParameter: float negative_slope = 1
ELUParameter: float alpha = 1
EltwiseParameter: EltwiseOp operation = 1, float* coeff = 2
DropoutParameter: float dropout_ratio = 1
BatchNormParameter: bool use_global_stats = 1, float moving_average_fraction = 2, float eps = 3
ScaleParameter: bool bias_term = 4
LayerParameter: string name = 1, string type = 2, string* bottom = 3, string* top = 4, ParamSpec* param = 6,
  BlobProto* blobs = 7, TransformationParameter transform_param = 100,
  ConvolutionParameter convolution_param = 106, DropoutParameter dropout_param = 108,
  EltwiseParameter eltwise_param = 110, InnerProductParameter inner_product_param = 117,
  LRNParameter lrn_param = 118, PoolingParameter pooling_param = 121, ReLUParameter relu_param = 123,
  BatchNormParameter batch_norm_param = 139, ELUParameter elu_param = 140, ScaleParameter scale_param = 142,
  InputParameter input_param = 143
# Files from before 2015, as the published bvlc_alexnet.caffemodel, have these layers.
V1LayerParameter: string* bottom = 2, string* top = 3, string name = 4, int32 type = 5, BlobProto* blobs = 6,
  ConvolutionParameter convolution_param = 10, DropoutParameter dropout_param = 12,
  InnerProductParameter inner_product_param = 17, LRNParameter lrn_param = 18,
  PoolingParameter pooling_param = 19, ReLUParameter relu_param = 30,
  TransformationParameter transform_param = 36
NetParameter: string name = 1, V1LayerParameter* layers = 2, LayerParameter* layer = 100
"""
_ENUMS: dict[str, tuple[str, ...]] = {
  'NormRegion': ('ACROSS_CHANNELS', 'WITHIN_CHANNEL'),
  'PoolMethod': ('MAX', 'AVE'),
  'RoundMode': ('CEIL', 'FLOOR'),
  'EltwiseOp': ('PROD', 'SUM', 'MAXIMUM'),  # Caffe's MAX, a name that is taken
}
# V1's numbers for the kinds of layers that matter here; the others are named by their numbers.
V1_TYPES: dict[int, str] = {
  1: 'Accuracy', 4: 'Convolution', 5: 'Data', 6: 'Dropout', 7: 'EuclideanLoss', 8: 'Flatten', 9: 'HDF5Data',
  12: 'ImageData', 13: 'InfogainLoss', 14: 'InnerProduct', 15: 'LRN', 16: 'MultinomialLogisticLoss',
  17: 'Pooling', 18: 'ReLU', 19: 'Sigmoid', 20: 'Softmax', 21: 'SoftmaxWithLoss', 22: 'Split', 23: 'TanH',
  24: 'WindowData', 27: 'SigmoidCrossEntropyLoss', 28: 'HingeLoss', 29: 'MemoryData', 30: 'ArgMax',
  32: 'DummyData', 36: 'Silence',
}  # fmt: skip


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
  messages = dict(re.findall(r'^(\w+): ((?:.+|\n  )+)', _MESSAGES, re.MULTILINE))
  for name, fields in messages.items():
    message = file.message_type.add(name=name)
    for kind, field, number in re.findall(r'(\S+)\s+(\w+)\s+=\s+(\d+)', fields):
      plain = kind.rstrip('*+')
      label = field_type.LABEL_OPTIONAL if plain == kind else field_type.LABEL_REPEATED
      added = message.field.add(name=field, number=int(number), label=label)
      if plain in messages or plain in _ENUMS:
        added.type = field_type.TYPE_MESSAGE if plain in messages else field_type.TYPE_ENUM
        added.type_name = f'.{_PACKAGE}.{plain}'
      else:
        added.type = getattr(field_type, f'TYPE_{plain.upper()}')
      if kind.endswith('+'):
        added.options.packed = True
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName(f'{_PACKAGE}.NetParameter'))
